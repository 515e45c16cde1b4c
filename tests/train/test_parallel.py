"""On meshes of eight simulated devices everything is as on one."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from flax import nnx

from cmamba_jax.batch import Batch
from cmamba_jax.config import (
    ExperimentConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PipelineConfig,
    TaskConfig,
    TrainConfig,
)
from cmamba_jax.data import Pipeline, from_arrays
from cmamba_jax.errors import UserError
from cmamba_jax.models import CoupledMamba
from cmamba_jax.train import optimizer, parallel, state
from cmamba_jax.train.checkpoint import Checkpoints, Position, load_last
from cmamba_jax.train.objective import make_loss_sum

TASK = TaskConfig(kind="classification", n_outputs=3)
FEATURES = {"text": 5, "audio": 3}
BATCH, LENGTH, STEPS = 8, 32, 50
# Mean pooling: the kinks of a maximum make training chaotic, so that on one device already a change of 1e-7 of the
# parameters moves the losses by 1e-3 within fifty steps.
CONFIG = ExperimentConfig(
    name="parallel",
    model=ModelConfig(
        d_model=8,
        d_state=4,
        n_layers=1,
        head_hidden=8,
        dropout=0.2,
        direction="bidirectional",
        encoder="conv",
        encoder_width=3,
        pooling="mean",
    ),
    pipeline=PipelineConfig(batch_size=BATCH, eval_batch_size=BATCH),
    optimizer=OptimizerConfig(learning_rate=3e-3, schedule="constant"),
)


def batch_of(seed):
    rng = np.random.default_rng(seed)
    mask = {m: rng.random((BATCH, LENGTH)) < 0.9 for m in FEATURES}
    inputs = {m: rng.normal(size=(BATCH, LENGTH, f)).astype(np.float32) for m, f in FEATURES.items()}
    labels = rng.integers(0, 3, BATCH).astype(np.int32)
    inputs["text"][:, :, 0] += labels[:, None]
    weight = np.ones(BATCH, np.float32)
    weight[-1] = seed % 2
    return Batch(inputs=inputs, mask=mask, labels=labels, weight=weight)


class Batches:
    """Batches by number."""

    def __init__(self, rows, first):
        self._next, self._rows = first, rows

    def __next__(self):
        self._next += 1
        return jax.tree.map(lambda v: v[self._rows], batch_of(self._next - 1))


@pytest.fixture(autouse=True, scope="module")
def _cut_everything():
    """The parameters here are smaller than what is worth cutting."""
    smallest, parallel.SMALLEST = parallel.SMALLEST, 16
    yield
    parallel.SMALLEST = smallest


@functools.cache
def build(config):
    """Strategy, compiled step and a function that makes the first state; compiled once a session."""
    strategy = parallel.make_strategy(config)
    schedule = optimizer.make_schedule(config.optimizer, steps_per_epoch=10, epochs=5)
    transformation = optimizer.make_optimizer(config.optimizer, schedule)

    def model():
        return state.split_model(CoupledMamba(config.model, features=FEATURES, task=TASK, rngs=nnx.Rngs(0)))

    step = state.make_train_step(model()[0], transformation, make_loss_sum(TASK, TrainConfig()), strategy)
    return strategy, step, lambda: strategy.place(state.init_state(model()[1], transformation, seed=3))


def train(config, train_state, steps):
    """The state after the steps of these numbers, with losses and norms of the gradients."""
    strategy, step, _ = build(config)
    batches, metrics = strategy.feed(Batches(strategy.rows(BATCH), steps[0]), BATCH), []
    for _ in steps:
        train_state, now = step(train_state, next(batches))
        metrics.append(now)
    losses = np.array([float(m.loss) for m in metrics])
    return train_state, losses, np.array([float(m.grad_norm) for m in metrics])


def curve(config, steps=STEPS):
    strategy, _, start = build(config)
    train_state, losses, norms = train(config, start(), range(1, steps + 1))
    return losses, norms, jax.device_get(strategy.portable(train_state.params))


def with_parallel(**axes):
    return dataclasses.replace(CONFIG, parallel=ParallelConfig(**axes))


@pytest.fixture(scope="module")
def one_device():
    return curve(CONFIG)


LAYOUTS = [
    {"data": 8},
    {"strategy": "pmap", "data": 8},
    {"fsdp": 8},
    {"tensor": 8},
    {"sequence": 8},
    {"fsdp": 2, "tensor": 2, "sequence": 2},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda v: "-".join(f"{k}{n}" for k, n in v.items()))
def test_fifty_steps_are_those_of_one_device(one_device, layout):
    losses, norms, params = curve(with_parallel(**layout))
    np.testing.assert_allclose(losses, one_device[0], atol=1e-5, rtol=0)
    np.testing.assert_allclose(norms, one_device[1], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params, one_device[2])
    assert losses[-10:].mean() < losses[:10].mean()


def collectives(config, length=LENGTH):
    """Kinds of the collectives of a compiled step and the shapes of their results."""
    strategy, step, start = build(config)
    batch = dataclasses.replace(
        batch_of(0),
        inputs={m: np.zeros((BATCH, length, f), np.float32) for m, f in FEATURES.items()},
        mask={m: np.ones((BATCH, length), bool) for m in FEATURES},
    )
    program = step.lower(start(), strategy.place_batch(batch)).compile().as_text()
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    return re.findall(rf"= (\(?\w+\[[^=]*?) ({kinds})(?:-start)?\(", program)


def test_a_checkpoint_continues_on_any_other_mesh(one_device, tmp_path):
    """From one device to eight, from data to fsdp, to replicas, to time, and back to one."""
    layouts = [{}, {"data": 8}, {"fsdp": 8}, {"strategy": "pmap", "data": 8}, {"sequence": 8}, {}]
    for i, layout in enumerate(layouts):
        config = with_parallel(**layout)
        strategy, _, start = build(config)
        train_state, position = start(), Position()
        if i:
            train_state, position = load_last(tmp_path, train_state, strategy)
        assert position.step == 2 * i
        train_state, losses, _ = train(config, train_state, range(2 * i + 1, 2 * i + 3))
        np.testing.assert_allclose(losses, one_device[0][2 * i : 2 * i + 2], atol=1e-5, rtol=0)
        with Checkpoints(tmp_path, strategy) as checkpoints:
            checkpoints.save("last", train_state, Position(step=2 * i + 2))


def test_time_is_never_gathered_and_its_communication_does_not_grow():
    config = with_parallel(data=2, sequence=4)
    short, long = collectives(config), collectives(config, 3 * LENGTH)
    assert sorted(short) == sorted(long)
    assert {kind for _, kind in short} == {"all-reduce", "collective-permute"}


def test_fsdp_cuts_parameters_and_statistics():
    train_state = build(with_parallel(fsdp=8))[2]()
    held = sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(train_state))
    assert held < sum(leaf.size for leaf in jax.tree.leaves(train_state)) / 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel": ParallelConfig(data=16)}, r"need 16 devices, but there are 8; lower them"),
        ({"parallel": ParallelConfig(strategy="pmap", data=2, fsdp=2)}, "pmap makes replicas: it takes data alone"),
        ({"parallel": ParallelConfig(data=3)}, "batch_size is 8, expected a multiple of the 3 devices"),
        ({"parallel": ParallelConfig(tensor=3)}, "d_model is 16, expected a multiple of the 3 devices"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        parallel.make_strategy(dataclasses.replace(CONFIG, **changes))


def test_a_device_with_fewer_steps_than_a_convolution_looks_back_is_refused():
    with pytest.raises(UserError, match="looks 3 steps back, but 16 steps over 8 devices leave 2 steps a device"):
        collectives(with_parallel(sequence=8), 16)


def test_encoders_without_a_past_send_nothing():
    linear = dataclasses.replace(CONFIG.model, encoder="linear", direction="causal")
    config = dataclasses.replace(CONFIG, model=linear, parallel=ParallelConfig(sequence=2))
    shapes = [shape for shape, kind in collectives(config) if kind == "collective-permute"]
    assert shapes and not any(re.search(r"\b0\b(?=[,\]])", shape) for shape in shapes)


def test_data_zero_takes_the_devices_that_are_left():
    assert parallel.resolve_sizes(ParallelConfig(data=0, sequence=2), 8)["data"] == 4


@pytest.mark.parametrize("remat", ["layer", "dots"])
def test_rematerialised_layers_change_nothing_but_memory(remat, one_device):
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, remat=remat))
    losses, norms, _ = curve(config, 3)
    np.testing.assert_allclose(losses, one_device[0][:3], rtol=1e-6)
    np.testing.assert_allclose(norms, one_device[1][:3], rtol=1e-5)


def test_length_buckets_bound_the_compilations():
    """One program a bucket, however many lengths the samples have."""
    rng = np.random.default_rng(0)
    samples = [rng.normal(size=(n, 2)).astype(np.float32) for n in rng.integers(3, 30, 48)]
    splits = from_arrays({"a": samples}, rng.integers(0, 3, 48))
    buckets = (8, 16, 32)
    pipeline = Pipeline(splits, PipelineConfig(batch_size=4, buckets=buckets), seed=0, length_multiple=4)
    model = ModelConfig(d_model=4, d_state=2, n_layers=1, head_hidden=4)
    graphdef, params = state.split_model(CoupledMamba(model, features={"a": 2}, task=TASK, rngs=nnx.Rngs(0)))
    transformation = optimizer.make_optimizer(
        CONFIG.optimizer, optimizer.make_schedule(CONFIG.optimizer, steps_per_epoch=1, epochs=1)
    )
    step = state.make_train_step(graphdef, transformation, make_loss_sum(TASK, TrainConfig()))
    train_state, batches = state.init_state(params, transformation, seed=0), pipeline.train()
    lengths = set()
    for _ in range(2 * pipeline.steps_per_epoch):
        batch = next(batches)
        lengths.add(batch.inputs["a"].shape[1])
        train_state, _ = step(train_state, batch)
    assert lengths == set(buckets) and step._cache_size() == len(buckets)
