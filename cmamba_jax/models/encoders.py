"""Per-modality encoders: features of any width to the model's width."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from cmamba_jax.config import ModelConfig
from cmamba_jax.models import functional

MLP_HIDDEN = 256
"""Hidden units of the "mlp" encoder, as in the published code."""


class Encoder(nnx.Module):
    """One of three maps from features to the model's width.

    "linear": a linear map; "conv": a causal convolution over time and SiLU; "mlp": Linear-LayerNorm-ReLU-Linear-
    LayerNorm.

    Args:
        config: width, kind, taps and compute dtype.
        n_features: F of the modality.
        rngs: source of the initial parameters.
    """

    def __init__(self, config: ModelConfig, n_features: int, *, rngs: nnx.Rngs):
        taps = config.encoder_width if config.encoder == "conv" else 1
        self.dtype = jnp.dtype(config.compute_dtype)
        self.activation = jax.nn.silu if config.encoder == "conv" else None
        fan_in = taps * n_features
        width = MLP_HIDDEN if config.encoder == "mlp" else config.d_model
        self.kernel = nnx.Param(functional.uniform_fan_in(rngs.params(), (taps, n_features, width), fan_in))
        self.bias = nnx.Param(functional.uniform_fan_in(rngs.params(), (width,), fan_in))
        if config.encoder == "mlp":
            out = config.d_model
            self.hidden_scale = nnx.Param(jnp.ones((width,), jnp.float32))
            self.hidden_bias = nnx.Param(jnp.zeros((width,), jnp.float32))
            self.out = nnx.Param(functional.uniform_fan_in(rngs.params(), (width, out), width))
            self.out_bias = nnx.Param(functional.uniform_fan_in(rngs.params(), (out,), width))
            self.norm_scale = nnx.Param(jnp.ones((out,), jnp.float32))
            self.norm_bias = nnx.Param(jnp.zeros((out,), jnp.float32))

    def init_state(self, batch_size: int) -> Float[Array, "B W F"]:
        """The input window before the first step: zeros."""
        taps, features, _ = self.kernel.shape
        return jnp.zeros((batch_size, taps - 1, features), jnp.float32)

    def __call__(
        self,
        x: Float[Array, "B L F"],
        *,
        mask: Bool[Array, "B L"] | None,
        reset: Bool[Array, "B L"] | None,
        window: Float[Array, "B W F"],
    ) -> tuple[Float[Array, "B L E"], Float[Array, "B W F"]]:
        """Encodes a sequence.

        Args:
            x: features, zero where masked.
            mask: False where the modality is missing.
            reset: True where a new sequence starts.
            window: the inputs before these.

        Returns:
            float32 [B, L, d_model], zero where masked, and the window that continues the sequence.
        """
        taps, window = functional.history(x.astype(jnp.float32), window, reset)
        stacked = jnp.concatenate(taps[::-1], axis=-1).astype(self.dtype)  # [B, L, K * F], oldest first
        kernel = self.kernel[...].astype(self.dtype)
        out = stacked @ kernel.reshape(-1, kernel.shape[-1]) + self.bias[...].astype(self.dtype)
        if self.activation is not None:
            out = self.activation(out)
        if hasattr(self, "out"):
            hidden = jax.nn.relu(_layer_norm(out, self.hidden_scale[...], self.hidden_bias[...])).astype(self.dtype)
            out = hidden @ self.out[...].astype(self.dtype) + self.out_bias[...].astype(self.dtype)
            out = _layer_norm(out, self.norm_scale[...], self.norm_bias[...])
        return functional.keep(out.astype(jnp.float32), mask), window


def _layer_norm(x: Float[Array, "B L F"], scale: Float[Array, " F"], bias: Float[Array, " F"]) -> Float[Array, "B L F"]:
    """`functional.layer_norm` of one modality."""
    return functional.layer_norm(x[None], scale[None], bias[None])[0]
