"""The causal convolution with SiLU as XLA compiles it, on every device."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

Array = jax.Array


def sum_taps(taps: Sequence[Array], kernel: Array, bias: Array) -> Array:
    """bias + SUM_j kernel_{W-j} taps_j in the dtype of the taps, where taps_j is the sequence j steps back.

    Written as K shifted products, which XLA fuses into one pass; its depthwise convolutions are slower.
    """
    kernel, total = kernel.astype(taps[0].dtype), bias.astype(taps[0].dtype)[:, None, None]
    for j, tap in enumerate(taps):
        total = total + kernel[:, None, None, kernel.shape[1] - 1 - j] * tap
    return total


def conv_silu(x: Array, kernel: Array, bias: Array, window: Array, mask: Array | None) -> Array:
    """Computes what `causal_conv_silu` does."""
    if mask is not None:
        x = jnp.where(mask[..., None], x, 0)
    extended, width = jnp.concatenate([window.astype(x.dtype), x], axis=2), kernel.shape[1] - 1
    taps = [jax.lax.slice_in_dim(extended, width - j, width - j + x.shape[2], axis=2) for j in range(width + 1)]
    return jax.nn.silu(sum_taps(taps, kernel, bias))
