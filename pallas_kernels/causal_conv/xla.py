"""The causal convolution with SiLU as XLA compiles it, on every device."""

import jax
import jax.numpy as jnp

Array = jax.Array


def conv_silu(x: Array, kernel: Array, bias: Array, window: Array, mask: Array | None) -> Array:
    """Computes what `causal_conv_silu` does, as K shifted products in x's dtype."""
    kernel, bias = kernel.astype(x.dtype), bias.astype(x.dtype)
    if mask is not None:
        x = jnp.where(mask[..., None], x, 0)
    extended = jnp.concatenate([window.astype(x.dtype), x], axis=2)
    total = bias[:, None, None]
    for k in range(kernel.shape[1]):
        total = total + kernel[:, None, None, k] * jax.lax.slice_in_dim(extended, k, k + x.shape[2], axis=2)
    return jax.nn.silu(total)
