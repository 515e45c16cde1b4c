"""From the residual streams of the modalities to a prediction: pooling over time, fusion, head."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from cmamba_jax.config import ModelConfig
from cmamba_jax.models import functional
from cmamba_jax.models.block import draw, dropout


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PoolState:
    """Pooling over the steps so far.

    Attributes:
        value: running maximum, sum or last value, float32 [M, B, F].
        count: observed steps of each modality, float32 [M, B].
    """

    value: Float[Array, "M B F"]
    count: Float[Array, "M B"]


Pooling = Literal["max", "mean", "last"]


def init_pool(kind: Pooling, shape: tuple[int, int, int]) -> PoolState:
    """The pool [M, B, F] before the first step."""
    return PoolState(jnp.full(shape, -jnp.inf if kind == "max" else 0.0, jnp.float32), jnp.zeros(shape[:2]))


def pool(kind: Pooling, state: PoolState, x: Float[Array, "M B L F"], mask: Bool[Array, "M B L"] | None) -> PoolState:
    """Adds L steps to the pool; masked steps do not count."""
    if mask is None:
        mask = jnp.ones(x.shape[:3], bool)
    count = state.count + jnp.sum(mask, axis=2)
    if kind == "max":
        value = jnp.maximum(state.value, jnp.max(jnp.where(mask[..., None], x, -jnp.inf), axis=2))
    elif kind == "mean":
        value = state.value + jnp.sum(functional.keep(x, mask), axis=2)
    else:
        last = jnp.max(jnp.where(mask, jnp.arange(x.shape[2]), -1), axis=2)
        newest = jnp.take_along_axis(x, jnp.maximum(last, 0)[:, :, None, None], axis=2)[:, :, 0]
        value = jnp.where(last[..., None] >= 0, newest, state.value)
    return PoolState(value, count)


def pooled(kind: Pooling, state: PoolState) -> Float[Array, "M B F"]:
    """The pooled features; zero for a modality that was never observed."""
    value = state.value / jnp.maximum(state.count, 1)[..., None] if kind == "mean" else state.value
    return functional.keep(value, state.count > 0)


class FusionHead(nnx.Module):
    """Fuses the modalities and predicts: Linear-ReLU-Linear on their softmax-weighted sum (the published code's).

    Args:
        config: kind of fusion, sizes and dropout.
        n_modalities: M.
        n_outputs: K.
        rngs: source of the initial parameters.
    """

    def __init__(self, config: ModelConfig, n_modalities: int, n_outputs: int, *, rngs: nnx.Rngs):
        width = config.d_model * (n_modalities if config.fusion == "concat" else 1)
        self.fusion = config.fusion
        self.dropout = config.dropout
        if config.fusion == "weighted":
            self.weights = nnx.Param(jnp.zeros((n_modalities,), jnp.float32))
        self.hidden = nnx.Param(functional.uniform_fan_in(rngs.params(), (width, config.head_hidden), width))
        self.hidden_bias = nnx.Param(functional.uniform_fan_in(rngs.params(), (config.head_hidden,), width))
        self.out = nnx.Param(
            functional.uniform_fan_in(rngs.params(), (config.head_hidden, n_outputs), config.head_hidden)
        )
        self.out_bias = nnx.Param(functional.uniform_fan_in(rngs.params(), (n_outputs,), config.head_hidden))

    def __call__(
        self, x: Float[Array, "M *batch F"], present: Bool[Array, "M *batch"], *, rngs: nnx.Rngs | None
    ) -> Float[Array, "*batch K"]:
        """Predicts, in float32.

        Args:
            x: features of each modality, zero where absent.
            present: which modalities there are; the weights of the fusion are shared out among those.
            rngs: for dropout; None: no dropout.
        """
        if self.fusion == "late":
            return self._average(self._predict(x, rngs), present, jnp.zeros(x.shape[0]))
        if self.fusion == "concat":
            return self._predict(jnp.concatenate(list(x), axis=-1), rngs)
        weights = self.weights[...] if self.fusion == "weighted" else jnp.zeros(x.shape[0])
        return self._predict(self._average(x, present, weights), rngs)

    def _average(
        self, x: Float[Array, "M *batch F"], present: Bool[Array, "M *batch"], logits: Float[Array, " M"]
    ) -> Float[Array, "*batch F"]:
        weights = jnp.exp(logits - jnp.max(logits)).reshape(-1, *(1 for _ in present.shape[1:]))
        weights = jnp.where(present, weights, 0)
        # Where every modality is absent the sum is zero, not 0 / 0.
        share = weights / jnp.maximum(jnp.sum(weights, axis=0), jnp.finfo(jnp.float32).tiny)
        return jnp.sum(functional.keep(x, present) * share[..., None], axis=0)

    def _predict(self, x: Float[Array, "*batch F"], rngs: nnx.Rngs | None) -> Float[Array, "*batch K"]:
        x = dropout(x, self.dropout, draw(self.dropout, rngs), batch_axis=1 if self.fusion == "late" else 0)
        hidden = jax.nn.relu(x @ self.hidden[...] + self.hidden_bias[...])
        return hidden @ self.out[...] + self.out_bias[...]
