"""Baselines beside the coupled blocks: crossmodal attention (MulT), and fusion of the modalities before any layer."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from cmamba_jax.config import ModelConfig
from cmamba_jax.errors import UserError
from cmamba_jax.models import functional
from cmamba_jax.models.block import dropout
from cmamba_jax.models.ssm import CoupledSSM, SSMState
from pallas_kernels.platform import default_platform


class CrossAttentionBlock(nnx.Module):
    """Every modality attends to every modality, itself included, with one attention for each pair; then an MLP.

    The block of the multimodal transformer (Tsai et al., arXiv 1906.00295, the paper's Table 8), pre-normalised, with
    the self-attention as one more pair, so that M = 1 is a transformer. Its cost grows with the square of L and of M.

    Args:
        config: `d_model`, `expand` (width of the MLP), `n_heads`, `direction` (causal or not), dropout, compute dtype.
        n_modalities: M.
        rngs: source of the initial parameters.

    Raises:
        UserError: the heads do not divide the width.
    """

    def __init__(self, config: ModelConfig, n_modalities: int, *, rngs: nnx.Rngs):
        m, f, hidden = n_modalities, config.d_model, config.expand * config.d_model
        if f % config.n_heads:
            raise UserError(
                f"model.d_model {f} has to be a multiple of model.n_heads {config.n_heads} for coupling "
                "'cross_attention'; change one of them"
            )
        self.n_heads = config.n_heads
        self.causal = config.direction == "causal"
        self.dropout = config.dropout
        self.dtype = jnp.dtype(config.compute_dtype)
        self.norm_scale = nnx.Param(jnp.ones((m, f), jnp.float32))
        self.norm_bias = nnx.Param(jnp.zeros((m, f), jnp.float32))
        # Axes: reading modality, modality that is read, in, out. Queries, keys and values of a pair are its own.
        self.query = nnx.Param(functional.uniform_fan_in(rngs.params(), (m, m, f, f), f))
        self.key_value = nnx.Param(functional.uniform_fan_in(rngs.params(), (m, m, f, 2 * f), f))
        self.out = nnx.Param(functional.uniform_fan_in(rngs.params(), (m, m, f, f), m * f))
        self.mlp_norm_scale = nnx.Param(jnp.ones((m, f), jnp.float32))
        self.mlp_norm_bias = nnx.Param(jnp.zeros((m, f), jnp.float32))
        self.up = nnx.Param(functional.uniform_fan_in(rngs.params(), (m, f, hidden), f))
        self.up_bias = nnx.Param(jnp.zeros((m, hidden), jnp.float32))
        self.down = nnx.Param(functional.uniform_fan_in(rngs.params(), (m, hidden, f), hidden))

    def ssms(self) -> dict[str, CoupledSSM]:
        """None: the block has no scan and carries no state."""
        return {}

    def __call__(
        self,
        x: Float[Array, "M B L F"],
        *,
        mask: Bool[Array, "M B L"] | None,
        reset: Bool[Array, "B L"] | None,
        state: dict[str, SSMState],
        key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "M B L F"], dict[str, SSMState]]:
        """Applies the block to the residual stream x (float32); the signature is that of `CoupledMambaBlock`.

        Args:
            x: residual stream; zero where masked.
            mask: False where a modality is missing: such steps are not attended to, and stay zero.
            reset: True where a new sequence starts; attention does not reach across.
            state: empty, see `ssms`.
            key: for dropout, see `block.draw`; None: no dropout.

        Returns:
            The residual stream after the block, and `state`.
        """
        m, b, length, f = x.shape
        dropout_keys = (None, None) if key is None else jax.random.split(key)
        normed = functional.layer_norm(x, self.norm_scale[...], self.norm_bias[...]).astype(self.dtype)
        query = jnp.einsum("mblf,mifg->miblg", normed, self.query[...].astype(self.dtype))
        key_value = jnp.einsum("iblf,mifg->miblg", normed, self.key_value[...].astype(self.dtype))
        heads = (m * m * b, length, self.n_heads, f // self.n_heads)
        keys, values = (part.reshape(heads) for part in jnp.split(key_value, 2, axis=-1))

        allowed = None if mask is None and reset is None else self._allowed(mask, reset, (m, b, length))
        read = attend(query.reshape(heads), keys, values, causal=self.causal, allowed=allowed)
        read = read.reshape(m * m * b, length, f)
        if allowed is not None:
            # Where there is nothing to attend to, the softmax is even over what is missing: it reads nothing.
            read = functional.keep(read, jnp.any(allowed, axis=-1))
        out = jnp.einsum("miblg,migf->mblf", read.reshape(m, m, b, length, f), self.out[...].astype(self.dtype))
        x = functional.keep(x + dropout(out.astype(jnp.float32), self.dropout, dropout_keys[0], batch_axis=1), mask)

        normed = functional.layer_norm(x, self.mlp_norm_scale[...], self.mlp_norm_bias[...])
        bias = self.up_bias[...].astype(self.dtype)[:, None, None]
        hidden = jax.nn.gelu(functional.linear(normed, self.up[...], self.dtype) + bias)
        out = functional.linear(hidden, self.down[...], self.dtype).astype(jnp.float32)
        return functional.keep(x + dropout(out, self.dropout, dropout_keys[1], batch_axis=1), mask), state

    def _allowed(
        self, mask: Bool[Array, "M B L"] | None, reset: Bool[Array, "B L"] | None, shape: tuple[int, int, int]
    ) -> Bool[Array, "MMB L L"]:
        """Which steps (last axis) each step reads, for all pairs of modalities and all sequences."""
        m, b, length = shape
        allowed = jnp.ones((length, length), bool)
        if self.causal:
            allowed = jnp.tril(allowed)
        allowed = jnp.broadcast_to(allowed, (m, m, b, length, length))
        if reset is not None:
            sequence = jnp.cumsum(reset, axis=1)
            allowed = allowed & (sequence[:, :, None] == sequence[:, None, :])
        if mask is not None:
            allowed = allowed & mask[:, :, None, :]
        return allowed.reshape(m * m * b, length, length)


def attend(
    query: Float[Array, "B L H F"],
    key: Float[Array, "B L H F"],
    value: Float[Array, "B L H F"],
    *,
    causal: bool,
    allowed: Bool[Array, "B L L"] | None = None,
) -> Float[Array, "B L H F"]:
    """Softmax attention by `jax.nn.dot_product_attention`; cuDNN's flash attention where it can do it.

    It can on NVIDIA GPUs since Ampere, in bfloat16 or float16, without `allowed`: a mask of size L x L would undo what
    it saves. Elsewhere XLA's runs, whose memory grows with the square of L.

    Args:
        query: of H heads of width F.
        key: likewise.
        value: likewise.
        causal: steps read themselves and those before; counts only without `allowed`.
        allowed: which steps (last axis) each step reads; None: as `causal` says.
    """
    if allowed is not None:
        return jax.nn.dot_product_attention(query, key, value, mask=allowed[:, None])
    width = query.shape[-1]
    if not (_has_flash_attention() and query.dtype in (jnp.bfloat16, jnp.float16) and width <= 128):
        return jax.nn.dot_product_attention(query, key, value, is_causal=causal)
    # cuDNN wants widths of whole eights; zeros change no product.
    query, key, value = (jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, -width % 8))) for v in (query, key, value))
    read = jax.nn.dot_product_attention(query, key, value, is_causal=causal, scale=width**-0.5, implementation="cudnn")
    return read[..., :width]


def _has_flash_attention() -> bool:
    """Whether the default device is an NVIDIA GPU of compute capability 8.0 or later."""
    capability = getattr(jax.devices()[0], "compute_capability", "")
    return default_platform() == "gpu" and re.fullmatch(r"([89]|\d\d+)\.\d+", str(capability)) is not None


def positions(length: int, width: int, reset: Bool[Array, "B L"] | None) -> Float[Array, "#B L F"]:
    """Sines and cosines of the position of each step in its sequence (Vaswani et al., arXiv 1706.03762)."""
    step = jnp.arange(length)[None]
    if reset is not None:
        step = step - jax.lax.cummax(jnp.where(reset, step, 0), axis=1)
    rate = jnp.exp(-np.log(1e4) * jnp.arange(-(-width // 2)) / max(width // 2, 1))
    angle = step[..., None] * rate
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)[..., :width]


class EarlyFusion(nnx.Module):
    """Makes one stream of all modalities, step by step: their mean, or a linear map of their concatenation.

    Args:
        config: `early_fusion` ("average" or "concat"), width and compute dtype.
        n_modalities: M.
        rngs: source of the initial parameters.
    """

    def __init__(self, config: ModelConfig, n_modalities: int, *, rngs: nnx.Rngs):
        self.dtype = jnp.dtype(config.compute_dtype)
        if config.early_fusion == "concat":
            fan_in = n_modalities * config.d_model
            self.kernel = nnx.Param(
                functional.uniform_fan_in(rngs.params(), (n_modalities, config.d_model, config.d_model), fan_in)
            )
            self.bias = nnx.Param(functional.uniform_fan_in(rngs.params(), (config.d_model,), fan_in))

    def __call__(
        self, x: Float[Array, "M B L F"], *, mask: Bool[Array, "M B L"] | None
    ) -> tuple[Float[Array, "1 B L F"], Bool[Array, "1 B L"] | None]:
        """Fuses the modalities; `x` is zero where masked.

        Returns:
            The stream, and where it exists: where any modality does.
        """
        seen = None if mask is None else jnp.any(mask, axis=0, keepdims=True)
        if hasattr(self, "kernel"):
            fused = jnp.einsum("mblf,mfg->blg", x.astype(self.dtype), self.kernel[...].astype(self.dtype))
            return functional.keep(fused.astype(jnp.float32)[None] + self.bias[...], seen), seen
        count = x.shape[0] if mask is None else jnp.maximum(jnp.sum(mask, axis=0), 1)[..., None]
        return (jnp.sum(x, axis=0) / count)[None], seen
