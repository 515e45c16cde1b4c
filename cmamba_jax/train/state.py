"""The training state, and the two jitted functions that the loop calls."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from cmamba_jax.batch import Batch
from cmamba_jax.models import ModelState
from cmamba_jax.train.compilation import jit

Params = dict[str, Any]
LossSum = Callable[[jax.Array, Batch], tuple[jax.Array, jax.Array]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a training step changes.

    Attributes:
        step: number of batches so far, int32.
        params: the model's parameters, a pure dict of arrays.
        opt_state: state of the optimizer.
        key: the run's random key; step t draws from fold_in(key, t).
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    key: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """What a training step reports; arrays on the device until somebody reads them.

    Attributes:
        loss: mean loss of the batch.
        grad_norm: global norm of the gradient, before clipping.
        squares: squared norm of the gradient of each parameter, in the order of `parameter_names`.
    """

    loss: jax.Array
    grad_norm: jax.Array
    squares: jax.Array


class Strategy:
    """How the training step is spread over devices; this one: not at all. The others are in parallel.py."""

    def gather(self, params: Params) -> Params:
        """Inside a step: the parameters as the model reads them."""
        return params

    def total(self, tree: Any) -> Any:
        """Inside a step: sums over replicas that know nothing of each other."""
        return tree

    def compile_step(
        self, step: Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]
    ) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
        """Compiles a training step; the state passed in is donated."""
        return jit(step, donate_argnums=0)

    def compile_predict(self, predict: Callable[[Params, Batch], jax.Array]) -> Callable[[Params, Batch], jax.Array]:
        """Compiles a function of parameters, as `portable` returns them, and a batch."""
        return jit(predict)

    def place(self, state: TrainState) -> TrainState:
        """Puts a state that every process holds whole onto the devices."""
        return state

    def portable(self, tree: Any) -> Any:
        """A state, or a part of one, as ordinary arrays that can be saved and restored on other devices."""
        return tree

    def rows(self, batch_size: int) -> slice:
        """The samples of a training batch that this process has to read."""
        return slice(0, batch_size)

    def feed(self, batches: Any, batch_size: int) -> Any:
        """An iterator like `batches`, which yields the `rows` of each, whose batches lie on the devices."""
        del batch_size
        return batches


def split_model(model: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """Splits a model into its static graph and a pure dict of its parameters."""
    graphdef, params = nnx.split(model, nnx.Param)
    return graphdef, nnx.to_pure_dict(params)


def init_state(params: Params, optimizer: optax.GradientTransformation, *, seed: int) -> TrainState:
    """The state before the first step. It owns the parameters: the training step donates them."""
    return TrainState(jnp.int32(0), params, optimizer.init(params), jax.random.key(seed))


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    loss_sum: LossSum,
    strategy: Strategy | None = None,
) -> TrainStep:
    """Compiles `train_step`; the state passed in is donated.

    The model is merged while tracing only, so a call costs what a `jax.jit` of a function of plain dicts costs.
    """
    strategy = strategy or Strategy()
    return strategy.compile_step(train_step(graphdef, optimizer, loss_sum, strategy))


def train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    loss_sum: LossSum,
    strategy: Strategy | None = None,
) -> TrainStep:
    """The pure function ``step(state, batch) -> (state, metrics)``, to be compiled as it is or for many states at once.

    A step whose loss or gradient is not finite leaves the parameters and the optimizer as they were.

    Args:
        graphdef: from `split_model`.
        optimizer: from `make_optimizer`.
        loss_sum: function of the logits and the batch, see `objective.loss_sum`.
        strategy: how the step is spread over devices; None: one device.
    """
    strategy = strategy or Strategy()

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        def loss(params: Params) -> jax.Array:
            model = nnx.merge(graphdef, strategy.gather(params))
            rngs = nnx.Rngs(dropout=jax.random.fold_in(state.key, state.step))
            total, count = loss_sum(model(batch, train=True, rngs=rngs).logits, batch)
            return total / jnp.maximum(strategy.total(count), 1)

        with jax.named_scope("forward_backward"):
            value, grads = strategy.total(jax.value_and_grad(loss)(state.params))
        squares = jnp.stack([jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(grads)])
        metrics = StepMetrics(value, jnp.sqrt(squares.sum()), squares)
        with jax.named_scope("update"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        finite = jnp.isfinite(value) & jnp.isfinite(metrics.grad_norm)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (optax.apply_updates(state.params, updates), opt_state),
            (state.params, state.opt_state),
        )
        return TrainState(state.step + 1, params, opt_state, state.key), metrics

    return step


def make_predict_step(graphdef: nnx.GraphDef, strategy: Strategy | None = None) -> Callable[[Params, Batch], jax.Array]:
    """Compiles ``predict(params, batch) -> logits``."""
    strategy = strategy or Strategy()
    return strategy.compile_predict(predict_step(graphdef, strategy))


def predict_step(graphdef: nnx.GraphDef, strategy: Strategy | None = None) -> Callable[[Params, Batch], jax.Array]:
    """The pure function ``predict(params, batch) -> logits``."""
    strategy = strategy or Strategy()
    return lambda params, batch: nnx.merge(graphdef, strategy.gather(params))(batch).logits


def make_stream_step(
    graphdef: nnx.GraphDef,
) -> Callable[[Params, ModelState, dict[str, Any], dict[str, Any]], tuple[jax.Array, ModelState]]:
    """Compiles ``step(params, state, inputs, mask) -> (logits, state)``, see `CoupledMamba.step`."""

    def step(
        params: Params, model_state: ModelState, inputs: dict[str, Any], mask: dict[str, Any]
    ) -> tuple[jax.Array, ModelState]:
        out = nnx.merge(graphdef, params).step(model_state, inputs, mask=mask)
        return out.logits, out.state

    return jit(step)


def parameter_names(params: Params) -> list[str]:
    """Dotted names of the parameters, in the order of `jax.tree.leaves`."""
    return [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
