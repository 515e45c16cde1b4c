"""Pure functions of the model: linear maps and norms stacked over modalities, the causal convolution, initialisers.

Axes: M modality, B batch, L time, D channel, K taps. Parameters of the M modalities are stacked on axis M, so that
one einsum serves them all.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from cmamba_jax.models import partition
from pallas_kernels import causal_conv
from pallas_kernels.causal_conv.xla import sum_taps


def uniform_fan_in(key: PRNGKeyArray, shape: Sequence[int], fan_in: int) -> Float[Array, "..."]:
    """Uniform in +-1/sqrt(fan_in), float32: the initialisation of linear and convolution layers in Mamba."""
    bound = 1.0 / math.sqrt(fan_in)
    return jax.random.uniform(key, tuple(shape), jnp.float32, -bound, bound)


def linear(x: Float[Array, "M B L I"], kernel: Float[Array, "M I O"], dtype: jnp.dtype) -> Float[Array, "M B L O"]:
    """Applies to each modality its own matrix, in the compute dtype."""
    return jnp.einsum("mbli,mio->mblo", x.astype(dtype), kernel.astype(dtype))


def layer_norm(
    x: Float[Array, "M B L F"], scale: Float[Array, "M F"], bias: Float[Array, "M F"]
) -> Float[Array, "M B L F"]:
    """LayerNorm over the features of each step, in float32."""
    x = x.astype(jnp.float32)
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + 1e-5) * scale[:, None, None] + bias[:, None, None]


def keep(x: Float[Array, "... F"], mask: Bool[Array, "..."] | None) -> Float[Array, "... F"]:
    """Zeroes the features of masked steps, [B, L] or [M, B, L]; garbage there, even NaN, does not pass."""
    return x if mask is None else jnp.where(mask[..., None], x, 0)


def frames(
    x: Float[Array, "B L F"], mask: Bool[Array, "B L"] | None, size: int
) -> tuple[Float[Array, "B T S"], Bool[Array, "B T"] | None]:
    """Stacks `size` consecutive samples into one step of size * F features; the last step is filled up with zeros.

    Returns:
        The steps, zero where samples are missing, and their mask: True where a sample of the step exists.
    """
    x = keep(x, mask)
    if size == 1:
        return x, mask
    batch, length, width = x.shape
    steps = -(-length // size)
    rest = ((0, 0), (0, steps * size - length))
    if mask is not None:
        mask = jnp.any(jnp.pad(mask, rest).reshape(batch, steps, size), axis=2)
    return jnp.pad(x, (*rest, (0, 0))).reshape(batch, steps, size * width), mask


def history(
    x: Float[Array, "*lead L F"],
    window: Float[Array, "*lead W F"],
    reset: Bool[Array, "B L"] | None,
    *,
    reverse: bool = False,
) -> tuple[list[Float[Array, "*lead L F"]], Float[Array, "*lead W F"]]:
    """The present and past steps that a causal convolution of W + 1 taps reads.

    Args:
        x: the sequence; the last leading axis is the batch.
        window: the W steps before it (zeros at the start of a sequence).
        reset: True where a new sequence starts; taps do not reach across.
        reverse: time runs backwards: "past" and "before" are later steps, and sequences start at their end.

    Returns:
        A list of W + 1 arrays shaped like x, entry j holding x_{l-j}, and the window that continues the sequence.
    """

    def run(x: Array, window: Array, reset: Array | None) -> tuple[list[Array], Array]:
        if not reverse:
            return _history(x, window, reset)
        taps, window = _history(jnp.flip(x, -2), window, None if reset is None else jnp.flip(reset, 1))
        return [jnp.flip(tap, -2) for tap in taps], window

    return partition.with_halo(run, x, window, reset, reverse=reverse)


def _history(
    x: Float[Array, "*lead L F"], window: Float[Array, "*lead W F"], reset: Bool[Array, "B L"] | None
) -> tuple[list[Float[Array, "*lead L F"]], Float[Array, "*lead W F"]]:
    length, width = x.shape[-2], window.shape[-2]
    extended = jnp.concatenate([window.astype(x.dtype), x], axis=-2)
    if reset is None:
        taps = [jax.lax.slice_in_dim(extended, width - j, width - j + length, axis=-2) for j in range(width + 1)]
        return taps, jax.lax.slice_in_dim(extended, length, length + width, axis=-2)
    # A tap reaches across a reset where the number of resets so far differs between its two ends.
    count = jnp.pad(jnp.cumsum(reset, axis=1, dtype=jnp.int32), ((0, 0), (width, 0)))
    now = count[:, width:]
    taps = []
    for j in range(width + 1):
        past = jax.lax.slice_in_dim(extended, width - j, width - j + length, axis=-2)
        taps.append(keep(past, count[:, width - j : width - j + length] == now))
    rest = jax.lax.slice_in_dim(extended, length, length + width, axis=-2)
    return taps, keep(rest, count[:, length:] == count[:, -1:])


def causal_depthwise_conv(
    x: Float[Array, "M B L D"],
    kernel: Float[Array, "M K D"],
    bias: Float[Array, "M D"],
    window: Float[Array, "M B W D"],
    reset: Bool[Array, "B L"] | None,
    *,
    reverse: bool = False,
) -> tuple[Float[Array, "M B L D"], Float[Array, "M B W D"]]:
    """Causal convolution of each channel with K = W + 1 taps; the last tap of the kernel meets the present step.

    In `reverse` it reads the present and later steps.

    Returns:
        The convolved sequence in x's dtype and the window that continues it.
    """
    taps, window = history(x, window, reset, reverse=reverse)
    return sum_taps(taps, kernel, bias), window


def causal_conv_silu(
    x: Float[Array, "M B L D"],
    mask: Bool[Array, "M B L"] | None,
    kernel: Float[Array, "M K D"],
    bias: Float[Array, "M D"],
    window: Float[Array, "M B W D"],
    reset: Bool[Array, "B L"] | None,
    *,
    reverse: bool = False,
    implementation: str | None = None,
) -> tuple[Float[Array, "M B L D"], Float[Array, "M B W D"]]:
    """SiLU of `causal_depthwise_conv` of what `keep` leaves of x.

    Without resets, forwards and outside of a partition over a mesh a kernel does it in one pass where there is one (see
    `pallas_kernels.causal_conv`); `implementation="xla"` leaves it to XLA everywhere, which arrays that are spread over
    devices without a partition need, since XLA gathers the inputs of a kernel.

    Returns:
        The result in x's dtype and the window that continues it.
    """
    kept = keep(x, mask)
    if reset is None and not reverse and not partition.spreads():
        name = implementation or causal_conv.choose_implementation(x, kernel, bias, window, mask)
        if name != "xla":
            _, after = history(kept, window, None)
            return causal_conv.causal_conv_silu(x, kernel, bias, window, mask, implementation=name), after
    total, after = causal_depthwise_conv(kept, kernel, bias, window, reset, reverse=reverse)
    return jax.nn.silu(total), after
