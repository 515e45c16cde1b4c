import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from cmamba_jax.config import ModelConfig, OptimizerConfig
from cmamba_jax.models import CoupledMamba
from cmamba_jax.train.optimizer import decay_mask, make_optimizer, make_schedule
from cmamba_jax.train.state import parameter_names, split_model


def run(config: OptimizerConfig, params, grads):
    transformation = make_optimizer(config, make_schedule(config, steps_per_epoch=10, epochs=1))
    state = transformation.init(params)
    for grad in grads:
        updates, state = transformation.update(grad, state, params)
        params = optax.apply_updates(params, updates)
    return params


def torch_adam(p, grads, *, lr, decay, clip, b1=0.9, b2=0.999, eps=1e-8):
    """torch.nn.utils.clip_grad_norm_, then torch.optim.Adam(weight_decay=decay), in float64."""
    m = v = np.zeros_like(p)
    for t, g in enumerate(grads, 1):
        g = g * min(1, clip / np.linalg.norm(g)) + decay * p
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        p = p - lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    return p


def test_adam_is_torchs_adam_with_weight_decay_and_clipping():
    rng = np.random.default_rng(0)
    p, grads = rng.normal(size=6), [3 * rng.normal(size=6) for _ in range(5)]
    config = OptimizerConfig(schedule="constant", learning_rate=0.1, weight_decay=0.3, clip_norm=1.5)
    ours = run(config, {"bias": jnp.asarray(p, jnp.float32)}, [{"bias": jnp.asarray(g, jnp.float32)} for g in grads])
    np.testing.assert_allclose(ours["bias"], torch_adam(p, grads, lr=0.1, decay=0.3, clip=1.5), rtol=1e-4)


def test_adamw_decays_matrices_apart_from_the_gradient():
    params = {"in_proj": jnp.ones(3), "bias": jnp.ones(3)}
    config = OptimizerConfig(name="adamw", schedule="constant", learning_rate=0.1, weight_decay=0.5, clip_norm=None)
    after = run(config, params, [jax.tree.map(jnp.zeros_like, params)])
    np.testing.assert_allclose(after["in_proj"], 1 - 0.1 * 0.5, rtol=1e-6)
    np.testing.assert_array_equal(after["bias"], params["bias"])


@pytest.mark.parametrize("coupling", ["shared", "full", "released"])
def test_adamw_decays_just_the_matrices_and_convolutions_of_the_model(coupling):
    config = ModelConfig(d_model=4, d_state=2, n_layers=2, coupling=coupling, head_hidden=4)
    model = nnx.eval_shape(lambda: CoupledMamba(config, features={"a": 2, "b": 3}, rngs=nnx.Rngs(0)))
    params = split_model(model)[1]
    decayed = {
        name.split(".")[-1]
        for name, decays in zip(parameter_names(params), jax.tree.leaves(decay_mask(params)), strict=True)
        if decays
    }
    assert decayed == {"kernel", "in_proj", "out_proj", "select", "dt_up", "conv_kernel", "hidden", "out"}


def test_accumulation_updates_once_with_the_mean_gradient():
    rng = np.random.default_rng(0)
    params = {"bias": jnp.ones(4)}
    grads = [{"bias": jnp.asarray(rng.normal(size=4), jnp.float32)} for _ in range(3)]
    config = OptimizerConfig(schedule="constant", learning_rate=0.1, accumulate=3)
    np.testing.assert_array_equal(run(config, params, grads[:2])["bias"], params["bias"])
    mean = jax.tree.map(lambda *g: sum(g) / 3, *grads)
    np.testing.assert_allclose(
        run(config, params, grads)["bias"],
        run(OptimizerConfig(schedule="constant", learning_rate=0.1), params, [mean])["bias"],
        rtol=1e-6,
    )


def test_step_schedule_halves_every_so_many_epochs():
    config = OptimizerConfig(learning_rate=1.0, schedule="step", step_epochs=3, step_factor=0.5)
    schedule = make_schedule(config, steps_per_epoch=7, epochs=9)
    rates = [float(schedule(step)) for step in range(9 * 7)]
    np.testing.assert_allclose(rates, np.repeat([1, 0.5, 0.25], 21))


def test_cosine_ends_at_zero_and_counts_updates_not_batches():
    config = OptimizerConfig(learning_rate=2.0, schedule="cosine", accumulate=2)
    schedule = make_schedule(config, steps_per_epoch=10, epochs=4)
    np.testing.assert_allclose([schedule(0), schedule(10), schedule(20)], [2, 1, 0], atol=1e-6)


@pytest.mark.parametrize("kind", ["constant", "step", "cosine"])
def test_warm_up_rises_evenly_to_the_learning_rate(kind):
    config = OptimizerConfig(learning_rate=0.6, schedule=kind, warmup_epochs=0.5)
    schedule = make_schedule(config, steps_per_epoch=10, epochs=4)
    np.testing.assert_allclose([schedule(i) for i in range(6)], 0.1 * np.arange(1, 7), rtol=1e-5)
