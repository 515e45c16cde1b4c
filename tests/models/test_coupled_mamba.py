"""Properties of the whole model, for every coupling and option that changes the computation."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cmamba_jax.batch import Batch
from cmamba_jax.config import ModelConfig, TaskConfig
from cmamba_jax.errors import UserError
from cmamba_jax.models import CoupledMamba

FEATURES = {"sound": 3, "motion": 5, "light": 2}
TINY = ModelConfig(d_model=8, d_state=4, n_layers=2, head_hidden=8)
VARIANTS = {
    "paper": TINY,
    "full": dataclasses.replace(TINY, coupling="full", fusion="concat", pooling="mean", encoder="conv"),
    "independent": dataclasses.replace(TINY, coupling="independent", fusion="late", pooling="last"),
    "released": dataclasses.replace(TINY, coupling="released", fusion="mean", block_norm="both", encoder="mlp"),
    "readout": dataclasses.replace(TINY, readout="shared", encoder="conv", encoder_width=3),
    "literal": dataclasses.replace(TINY, unnormalized=True),
}
BASELINES = {
    "attention": dataclasses.replace(TINY, coupling="cross_attention", n_heads=2),
    "early": dataclasses.replace(TINY, coupling="independent", early_fusion="concat", fusion="mean"),
    "no layers": dataclasses.replace(TINY, n_layers=0, fusion="mean"),
}
BIDIRECTIONAL = dataclasses.replace(TINY, direction="bidirectional")


def build(config, per="sequence", features=None, seed=0):
    model = CoupledMamba(
        config, features=features or FEATURES, task=TaskConfig("classification", 3, per), rngs=nnx.Rngs(seed)
    )
    # Random couplings: at the start all modalities weigh the same, which would hide mistakes.
    for block in model.blocks:
        for i, ssm in enumerate(block.ssms().values()):
            for name in ("gain", "mix"):
                if hasattr(ssm, name):
                    table = getattr(ssm, name)
                    table[...] = table[...] + jax.random.normal(jax.random.key(i), table.shape)
    return model


def make_batch(batch=2, length=9, masked=True, seed=0):
    rng = np.random.default_rng(seed)
    inputs = {m: rng.normal(size=(batch, length, f)).astype(np.float32) for m, f in FEATURES.items()}
    mask = {m: rng.random((batch, length)) < 0.7 for m in FEATURES} if masked else None
    return Batch(inputs=inputs, mask=mask)


def part(batch, start, stop):
    return jax.tree.map(lambda v: v[:, start:stop], batch)


@nnx.jit
def run(model, batch, state=None):
    return model(batch, state=state)


@nnx.jit
def run_step(model, state, inputs, mask):
    return model.step(state, inputs, mask=mask)


def close(a, b, **kwargs):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, **kwargs)


@pytest.mark.parametrize(("name", "per"), [*((name, "sequence") for name in VARIANTS), ("paper", "step")])
def test_whole_equals_parts_equals_steps(name, per):
    model, batch = build(VARIANTS[name], per), make_batch()
    whole = run(model, batch)

    first = run(model, part(batch, 0, 5))
    second = run(model, part(batch, 5, 9), first.state)
    state, steps = model.init_state(2), []
    for t in range(9):
        out = run_step(model, state, *({m: v[:, t] for m, v in d.items()} for d in (batch.inputs, batch.mask)))
        state = out.state
        steps.append(out.logits)

    if per == "step":
        assert whole.logits.shape == (2, 9, 3)
        close(jnp.concatenate([first.logits, second.logits], 1), whole.logits)
        close(jnp.stack(steps, 1), whole.logits)
    else:
        assert whole.logits.shape == (2, 3)
        close(second.logits, whole.logits)
        close(steps[-1], whole.logits)
        close(steps[4], first.logits)
    for other in (second.state, state):
        chex.assert_trees_all_close(other, whole.state, rtol=1e-4, atol=1e-5)


def test_frames_stack_samples_and_stream():
    """A model with frames is the same model on stacked samples; a step takes one frame."""
    config = dataclasses.replace(TINY, frame=3)
    model, batch = build(config), make_batch()
    stacked = build(TINY, features={m: 3 * f for m, f in FEATURES.items()})
    nnx.update(stacked, nnx.state(model, nnx.Param))
    seen = {m: v.reshape(2, 3, 3).any(2) for m, v in batch.mask.items()}
    by_hand = {m: np.where(batch.mask[m][..., None], v, 0).reshape(2, 3, -1) for m, v in batch.inputs.items()}
    whole = run(model, batch)
    close(whole.logits, run(stacked, Batch(by_hand, seen)).logits)

    state = model.init_state(2)
    for t in range(0, 9, 3):
        now = part(batch, t, t + 3)
        out = run_step(model, state, now.inputs, now.mask)
        state = out.state
    close(out.logits, whole.logits)


@pytest.mark.parametrize("name", [*VARIANTS, *BASELINES, "bidirectional", "frames"])
def test_padding_and_its_content_change_nothing(name):
    frames = dataclasses.replace(TINY, frame=2)
    models = {**VARIANTS, **BASELINES, "bidirectional": BIDIRECTIONAL, "frames": frames}
    model, batch = build(models[name]), make_batch()
    inputs = {m: np.concatenate([v, np.full_like(v[:, :4], np.nan)], 1) for m, v in batch.inputs.items()}
    mask = {m: np.pad(v, ((0, 0), (0, 4))) for m, v in batch.mask.items()}
    close(run(model, Batch(inputs, mask)).logits, run(model, batch).logits)


@pytest.mark.parametrize("name", [*VARIANTS, *BASELINES])
def test_the_future_does_not_change_the_past(name):
    model, batch = build((VARIANTS | BASELINES)[name], "step"), make_batch()
    changed = {m: np.concatenate([v[:, :6], v[:, 6:] + 1], 1) for m, v in batch.inputs.items()}
    before, after = run(model, batch).logits, run(model, dataclasses.replace(batch, inputs=changed)).logits
    close(after[:, :6], before[:, :6])
    assert not np.allclose(after[:, 6:], before[:, 6:])


@pytest.mark.parametrize("coupling", ["shared", "cross_attention"])
def test_a_bidirectional_model_reads_the_future(coupling):
    model = build(dataclasses.replace(BIDIRECTIONAL, coupling=coupling), "step")
    batch = make_batch(masked=False)
    changed = {m: np.concatenate([v[:, :1], -v[:, 1:]], 1) for m, v in batch.inputs.items()}
    first, other = (run(model, Batch(inputs)).logits[:, 0] for inputs in (batch.inputs, changed))
    assert np.abs(first - other).max() > 1e-3


@pytest.mark.parametrize("name", [*VARIANTS, "bidirectional", "attention"])
def test_packed_sequences_do_not_see_each_other(name):
    model = build({**VARIANTS, **BASELINES, "bidirectional": BIDIRECTIONAL}[name], "step")
    first, second = make_batch(length=5, seed=1), make_batch(length=4, seed=2)
    packed = jax.tree.map(lambda a, b: np.concatenate([a, b], 1), first, second)
    reset = np.zeros((2, 9), bool)
    reset[:, 5] = True
    separate = jnp.concatenate([run(model, first).logits, run(model, second).logits], 1)
    close(run(model, dataclasses.replace(packed, reset=reset)).logits, separate)


@pytest.mark.parametrize("name", ["paper", "full", "readout", "released", "attention"])
def test_one_modality_influences_the_others(name):
    """The residual stream of one modality depends on another's input; with independent chains it does not."""
    batch = make_batch(masked=False)
    changed = dataclasses.replace(batch, inputs={**batch.inputs, "light": batch.inputs["light"] + 1})

    def pooled_sound(config):
        model = build(config)  # Sound is the first stream.
        return [run(model, b).state.pool.value[0] for b in (batch, changed)]

    before, after = pooled_sound((VARIANTS | BASELINES)[name])
    assert not np.allclose(before, after, atol=1e-6)
    before, after = pooled_sound(VARIANTS["independent"])
    np.testing.assert_array_equal(before, after)


def test_the_order_of_the_input_dict_does_not_matter():
    model, batch = build(TINY), make_batch()
    turned = Batch(dict(reversed(batch.inputs.items())), dict(reversed(batch.mask.items())))
    np.testing.assert_array_equal(run(model, batch).logits, run(model, turned).logits)


def test_without_a_mask_everything_is_there():
    model, batch = build(TINY), make_batch(masked=False)
    everything = {m: np.ones(v.shape[:2], bool) for m, v in batch.inputs.items()}
    close(run(model, batch).logits, run(model, dataclasses.replace(batch, mask=everything)).logits)


def test_a_missing_modality_is_left_out_of_the_fusion():
    """Where one modality alone is observed, a weighted sum equals that modality's features."""
    batch = make_batch(masked=False)
    mask = {m: np.full((2, 9), m == "motion") for m in FEATURES}
    model = build(VARIANTS["independent"])
    alone = run(model, dataclasses.replace(batch, mask=mask))
    only = model.head(alone.state.pool.value[1:2], jnp.ones((1, 2), bool), rngs=None)
    close(alone.logits, only)


def test_nothing_observed_gives_finite_logits_and_gradients():
    model, batch = build(TINY), make_batch()
    nothing = {m: np.zeros((2, 9), bool) for m in FEATURES}
    grads = nnx.jit(nnx.grad(lambda model, batch: model(batch).logits.sum()))(
        model, dataclasses.replace(batch, mask=nothing)
    )
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("name", [*VARIANTS, *BASELINES, "bidirectional"])
def test_every_parameter_learns(name):
    models = {**VARIANTS, **BASELINES, "bidirectional": BIDIRECTIONAL}
    model, batch = build(models[name]), make_batch(batch=8, masked=False)
    grads = nnx.jit(nnx.grad(lambda model: jnp.square(model(batch).logits).sum()))(model)
    dead = [jax.tree_util.keystr(p) for p, g in jax.tree.leaves_with_path(grads) if not np.any(np.asarray(g))]
    assert not dead


def test_bfloat16_is_close_to_float32():
    batch = make_batch()
    exact = run(build(TINY), batch).logits
    rough = run(build(dataclasses.replace(TINY, compute_dtype="bfloat16")), batch)
    assert rough.logits.dtype == jnp.float32
    np.testing.assert_allclose(rough.logits, exact, atol=0.02)


def test_dropout_acts_in_training_only():
    model, batch = build(dataclasses.replace(TINY, dropout=0.5)), make_batch()
    train = nnx.jit(lambda model, key: model(batch, train=True, rngs=nnx.Rngs(dropout=key)).logits)
    a, b = (train(model, jax.random.key(s)) for s in (1, 2))
    assert not np.allclose(a, b)
    np.testing.assert_array_equal(run(model, batch).logits, run(build(TINY), batch).logits)


def test_initialisation_is_mambas():
    ssm = build(ModelConfig(n_layers=1, d_state=16)).blocks[0].forward_ssm
    np.testing.assert_allclose(-np.exp(ssm.A_log[...][1, 7]), -np.arange(1, 17), rtol=1e-6)
    dt = jax.nn.softplus(ssm.dt_bias[...])
    assert dt.min() >= 0.999e-3 and dt.max() <= 0.1001 and np.median(np.log10(dt)) == pytest.approx(-2, abs=0.15)
    fresh = CoupledMamba(ModelConfig(n_layers=1, d_state=16), features=FEATURES, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(fresh.coupling_tables()[0].values, 1 / 3, rtol=1e-6)


def test_coupling_tables_are_convex_weights():
    gain, *_ = build(TINY).coupling_tables()
    assert (gain.kind, gain.values.shape) == ("gain", (3, 4))
    np.testing.assert_allclose(gain.values.sum(0), 1, rtol=1e-6)
    weights, *_ = build(VARIANTS["full"]).coupling_tables()
    assert (weights.kind, weights.values.shape) == ("weights", (3, 3))
    np.testing.assert_allclose(weights.values.sum(1), 1, rtol=1e-6)
    (layer,) = build(VARIANTS["released"]).coupling_tables()
    assert layer.kind == "layer" and np.all(np.diag(layer.values) == 0) and np.all(layer.values + np.eye(3) > 0)
    assert build(VARIANTS["independent"]).coupling_tables() == []
    assert [t.direction for t in build(BIDIRECTIONAL).coupling_tables()] == ["forward", "backward"] * 2


def replaced(batch, name, value):
    return dataclasses.replace(batch, inputs={**batch.inputs, name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: replaced(b, "sound", b.inputs["sound"][..., :2]), r"sound \[B, L, 3\].*\(2, 9, 2\)"),
        (lambda b: replaced(b, "sound", b.inputs["sound"][:, :4]), r"one B and L.*\(2, 4, 3\)"),
        (lambda b: replaced(b, "smell", b.inputs["sound"]), r"expected the modalities.*smell"),
        (lambda b: Batch({"sound": b.inputs["sound"]}), r"pass zeros and a mask that is False"),
        (lambda b: dataclasses.replace(b, mask={"sound": b.mask["sound"]}), r"mask: expected the modalities"),
        (lambda b: dataclasses.replace(b, reset=np.zeros((2, 9), bool)), r"packed sequences need predictions per step"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        build(TINY)(change(make_batch()))


def test_options_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="use frame 1"):
        build(dataclasses.replace(TINY, frame=2), "step")
    with pytest.raises(UserError, match="at least 2"):
        build(VARIANTS["released"], features={"sound": 3})
    model = build(BIDIRECTIONAL)
    with pytest.raises(UserError, match="use 'causal'"):
        model.step(model.init_state(2), {m: v[:, 0] for m, v in make_batch().inputs.items()})
    model = build(BASELINES["attention"])
    with pytest.raises(UserError, match="attention needs the whole sequence"):
        model(make_batch(), state=model.init_state(2))
    with pytest.raises(UserError, match="multiple of model.n_heads 3"):
        build(dataclasses.replace(BASELINES["attention"], n_heads=3))
    with pytest.raises(UserError, match="at least 2"):
        build(dataclasses.replace(VARIANTS["released"], early_fusion="average"))
    with pytest.raises(UserError, match="rngs=nnx.Rngs"):
        build(dataclasses.replace(TINY, dropout=0.5))(make_batch(), train=True)
