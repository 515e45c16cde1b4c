"""What surrounds the recurrence at each step; the same for the reference and `xla`.

Shapes here have any leading axes; channels D (and states N) come last.
"""

import jax
import jax.numpy as jnp

Array = jax.Array


def keep(mask: Array | None, values: Array) -> Array:
    """Zeroes `values` [..., K] where `mask` [...] is False, so that garbage there cannot leak, not even NaN."""
    return values if mask is None else jnp.where(mask[..., None], values, 0)


def step_size(dt: Array, dt_bias: Array | None, mask: Array | None, *, softplus: bool) -> Array:
    """Effective step size in float32; exactly 0 where masked, which makes a = 1 and u = 0 there."""
    dt = keep(mask, dt).astype(jnp.float32)
    if dt_bias is not None:
        dt = dt + dt_bias.astype(jnp.float32)
    if softplus:
        dt = jax.nn.softplus(dt)
    return keep(mask, dt)


def finish(y: Array, x: Array, D: Array | None, z: Array | None, mask: Array | None) -> Array:
    """D skip, SiLU(z) gate and mask: y [..., D] float32 -> the operator's output in x's dtype.

    `x` and `z` are expected to be free of masked garbage (see `keep`).
    """
    if D is not None:
        y = y + D.astype(jnp.float32) * x.astype(jnp.float32)
    if z is not None:
        y = y * jax.nn.silu(z.astype(jnp.float32))
    return keep(mask, y).astype(x.dtype)
