import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from cmamba_jax.config import TrainConfig
from cmamba_jax.train.objective import make_loss_sum
from cmamba_jax.train.state import init_state, make_predict_step, make_train_step, parameter_names, split_model


@pytest.fixture
def build(tiny_model, tiny_task):
    def build(transformation=None, *, dropout=0.0, seed=0):
        transformation = transformation or optax.sgd(0.1)
        graphdef, params = split_model(tiny_model(dropout=dropout))
        step = make_train_step(graphdef, transformation, make_loss_sum(tiny_task, TrainConfig()))
        return graphdef, step, init_state(params, transformation, seed=seed)

    return build


def test_a_step_is_gradient_descent_on_the_mean_loss(build, tiny_model, tiny_task, batch):
    _, step, state = build()
    model, data = tiny_model(), batch()

    def loss(model):
        log_p = jax.nn.log_softmax(model(data).logits)
        return -log_p[jnp.arange(4), data.labels].mean()

    value, grads = nnx.value_and_grad(loss)(model)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, nnx.state(model), nnx.state(grads))
    after, metrics = step(state, data)
    for ours, theirs in zip(jax.tree.leaves(after.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(metrics.loss, value, rtol=1e-6)
    np.testing.assert_allclose(metrics.grad_norm**2, sum((g**2).sum() for g in jax.tree.leaves(grads)), rtol=1e-5)
    assert after.step == 1


def test_the_random_stream_depends_on_the_seed_and_the_step_alone(build, batch):
    def losses(seed, start=0):
        _, step, state = build(optax.sgd(0.0), dropout=0.5, seed=seed)
        state = dataclasses.replace(state, step=jnp.int32(start))
        out = []
        for _ in range(3):
            state, metrics = step(state, batch())
            out.append(float(metrics.loss))
        return out

    first = losses(0)
    assert len(set(first)) == 3
    assert losses(0) == first and losses(1) != first
    assert losses(0, start=1)[:2] == first[1:]


@pytest.mark.parametrize("poison", ["inputs", "params"])
def test_a_step_that_is_not_finite_changes_nothing_and_says_where(build, batch, poison):
    _, step, state = build(optax.adam(0.1))
    data = batch()
    if poison == "inputs":
        data.inputs["a"][0, 0, 0] = np.inf
    else:
        state.params["layers"][1]["bias"] = state.params["layers"][1]["bias"].at[0].set(jnp.nan)
    before = jax.tree.map(np.array, (state.params, state.opt_state))
    after, metrics = step(state, data)
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt_state), before)
    assert not np.isfinite(metrics.loss)
    assert after.step == 1
    assert not np.isfinite(metrics.squares).all()
    assert len(metrics.squares) == len(parameter_names(after.params))


def test_the_state_is_donated(build, batch):
    _, step, state = build()
    step(state, batch())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_predict_is_the_model_without_dropout(build, tiny_model, batch):
    graphdef, _, state = build(dropout=0.5)
    np.testing.assert_allclose(
        make_predict_step(graphdef)(state.params, batch()), tiny_model()(batch()).logits, rtol=1e-6
    )


def test_parameter_names(build):
    _, _, state = build()
    assert parameter_names(state.params) == ["layers.0.bias", "layers.0.kernel", "layers.1.bias", "layers.1.kernel"]
