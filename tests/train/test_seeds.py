"""A seed trained in a group equals the same seed trained alone."""

import dataclasses
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cmamba_jax.batch import Batch
from cmamba_jax.config import ParallelConfig, TrainConfig
from cmamba_jax.errors import UserError
from cmamba_jax.train import fit, fit_seeds, load_run, seeds, seeds_loop
from cmamba_jax.train.objective import make_loss_sum
from cmamba_jax.train.preemption import Preempted
from cmamba_jax.train.state import init_state, predict_step, split_model, train_step
from cmamba_jax.train.writers import read_history

SEEDS = (3, 1111)


def changed(config, folder, **train):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, run_dir=str(folder), **train))


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a, b)


def part(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


@pytest.fixture(scope="module")
def early(tiny_experiment):
    """Early stopping, so that the seeds end at different epochs."""
    return dataclasses.replace(
        tiny_experiment,
        train=dataclasses.replace(tiny_experiment.train, epochs=8, patience=2),
        optimizer=dataclasses.replace(tiny_experiment.optimizer, learning_rate=0.03),
    )


@pytest.fixture(scope="module")
def group(early, tmp_path_factory):
    folder = tmp_path_factory.mktemp("group")
    return fit_seeds(changed(early, folder / "group", seeds=SEEDS))


def epochs(run_dir):
    return max(record["epoch"] for record in read_history(run_dir))


def test_a_seed_equals_a_run_of_its_own(group, early, tmp_path):
    index = 1  # Not the seed that the group's pipeline and graph were made with.
    alone, member = fit(changed(early, tmp_path / "alone", seed=SEEDS[index])), group.runs[index]
    assert member.run_dir.name == f"seed_{SEEDS[index]}"
    for which in ("best", "last"):
        one, other = (load_run(run.run_dir, which=which) for run in (alone, member))
        assert one.epoch == other.epoch
        close(*(split_model(run.model)[1] for run in (one, other)))
    assert dataclasses.replace(one.config.train, run_dir=other.config.train.run_dir) == other.config.train
    for split, values in alone.metrics.items():
        close(values, member.metrics[split])
    records, others = (read_history(run.run_dir) for run in (alone, member))
    assert len(records) == len(others)
    for record, other in zip(records, others, strict=True):
        assert record["split"] == other["split"]
        close({k: v for k, v in record.items() if k != "split"}, {k: v for k, v in other.items() if k != "split"})
    assert member.report.exists()


@pytest.mark.parametrize("how", ["vmap", "loop"])
def test_one_step_of_the_group_is_one_step_of_each_seed(how, tiny_model, tiny_task, batch):
    """Gradients and optimizer states, dropout included; a stopped seed stays as it was."""
    transformation = optax.adam(0.01)
    graphdef, params = split_model(tiny_model(dropout=0.3))
    step = train_step(graphdef, transformation, make_loss_sum(tiny_task, TrainConfig()))
    singles = [init_state(jax.tree.map(jnp.copy, params), transformation, seed=seed) for seed in (1, 2, 3)]
    batches = [batch(seed=seed) for seed in (1, 2, 3)]
    alone = [jax.jit(step)(state, own) for state, own in zip(singles, batches, strict=True)]
    losses = [float(metrics.loss) for _, metrics in alone]
    assert len(set(losses)) == 3

    group = jax.tree.map(lambda *leaves: jnp.stack(leaves), *singles)
    active = jnp.array([True, False, True])
    group, metrics = seeds_loop.make_seeds_step(step, how)(group, seeds_loop.stacked(batches), active)
    np.testing.assert_allclose(metrics.loss, losses, rtol=1e-6)
    for i, (state, own) in enumerate(alone):
        close(part(metrics, i), own)
        expected = state if active[i] else singles[i]
        assert group.step[i] == expected.step
        close(part(group.params, i), expected.params)
        close(part(group.opt_state, i), expected.opt_state)

    predict = jax.jit(predict_step(graphdef))
    logits = seeds_loop.make_seeds_predict(graphdef, how)(group.params, batches[0])
    for i in range(3):
        np.testing.assert_allclose(logits[i], predict(part(group.params, i), batches[0]), rtol=1e-5, atol=1e-6)


def test_the_seeds_stop_by_themselves(group):
    assert epochs(group.runs[0].run_dir) != epochs(group.runs[1].run_dir)


def test_mean_and_deviation(group):
    values = [run.metrics["test"]["loss"] for run in group.runs]
    assert group.mean["test"]["loss"] == pytest.approx(np.mean(values))
    assert group.std["test"]["loss"] == pytest.approx(np.std(values, ddof=1))
    written = json.loads((group.run_dir / "seeds.json").read_text())
    assert written["seeds"] == list(SEEDS) and written["mean"] == group.mean and written["std"] == group.std


def test_a_resumed_group_equals_an_uninterrupted_one(group, early, tmp_path):
    """Continued when one seed has stopped and the other has not."""
    first = min(epochs(run.run_dir) for run in group.runs)
    fit_seeds(changed(early, tmp_path / "parts", seeds=SEEDS, epochs=first))
    parts = fit_seeds(changed(early, tmp_path / "parts", seeds=SEEDS, resume=True))
    assert parts.mean == group.mean
    for one, other in zip(parts.runs, group.runs, strict=True):
        assert (one.run_dir / "metrics.jsonl").read_bytes() == (other.run_dir / "metrics.jsonl").read_bytes()
        jax.tree.map(np.testing.assert_array_equal, *(split_model(load_run(r.run_dir).model)[1] for r in (one, other)))


@pytest.mark.parametrize("after", [1, 3])
def test_told_to_stop_a_group_saves_and_goes_on_as_if_nothing_had_been(group, early, tmp_path, monkeypatch, after):
    """SIGTERM within an epoch: in the first, and in one where a seed has stopped already."""
    steps = max(record["step"] for record in read_history(group.runs[0].run_dir)) // epochs(group.runs[0].run_dir)
    first = min(epochs(run.run_dir) for run in group.runs)
    at, make = 1 if after == 1 else first * steps + 1, seeds.make_seeds_step

    def told(*args, **kwargs):
        step, count = make(*args, **kwargs), [0]

        def counted(*trees):
            count[0] += 1
            if count[0] == at:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(*trees)

        return counted

    with monkeypatch.context() as patch:
        patch.setattr(seeds, "make_seeds_step", told)
        with pytest.raises(Preempted, match=f"saved at step {at}"):
            fit_seeds(changed(early, tmp_path / "told", seeds=SEEDS))
    rest = fit_seeds(changed(early, tmp_path / "told", seeds=SEEDS, resume=True))
    assert rest.mean == group.mean
    for one, other in zip(rest.runs, group.runs, strict=True):
        assert (one.run_dir / "metrics.jsonl").read_bytes() == (other.run_dir / "metrics.jsonl").read_bytes()
        jax.tree.map(np.testing.assert_array_equal, *(split_model(load_run(r.run_dir).model)[1] for r in (one, other)))


def test_batches_of_different_buckets_are_padded_to_the_longest():
    def make(length):
        mask = {"a": np.ones((2, length), bool)}
        return Batch({"a": np.ones((2, length, 3), np.float32)}, mask, np.zeros(2, np.int32), np.ones(2, np.float32))

    stacked = seeds_loop.stacked([make(4), make(6)])
    assert stacked.inputs["a"].shape == (2, 2, 6, 3) and stacked.labels.shape == (2, 2)
    assert not stacked.mask["a"][0, :, 4:].any() and stacked.mask["a"][1].all()


def test_seeds_that_do_not_fit_are_refused(group, early, tmp_path):
    for wrong in ((), (1, 1)):
        with pytest.raises(UserError, match="expected different numbers, at least one"):
            fit_seeds(changed(early, tmp_path, seeds=wrong))
    meshed = dataclasses.replace(changed(early, tmp_path, seeds=SEEDS), parallel=ParallelConfig(data=2))
    with pytest.raises(UserError, match=r"train.seeds trains all seeds on one device: leave out --parallel"):
        fit_seeds(meshed)
    with pytest.raises(UserError, match="use fit_seeds"):
        fit(changed(early, tmp_path, seeds=(1, 2)))
    with pytest.raises(UserError, match="name one of its subfolders: seed_3, seed_1111"):
        load_run(group.run_dir)
