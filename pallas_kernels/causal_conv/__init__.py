"""Causal depthwise convolution, bias and SiLU in one pass over memory.

Axes: M modality, B batch, L time, D channel, K taps, W = K - 1.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.causal_conv import xla
from pallas_kernels.coupled_scan.types import UnsupportedError
from pallas_kernels.coupled_scan.varying import varying_axes
from pallas_kernels.platform import default_platform, too_old_gpu

IMPLEMENTATIONS = ("xla", "mosaic_gpu")
MAX_TAPS = 8
"""Of the kernels."""
SHORTEST = 16
"""Steps below which XLA's is taken: the kernels work on tiles of 64 steps, and XLA fuses small ones with more."""


def causal_conv_silu(
    x: Float[Array, "M B L D"],
    kernel: Float[Array, "M K D"],
    bias: Float[Array, "M D"],
    window: Float[Array, "M B W D"],
    mask: Bool[Array, "M B L"] | None = None,
    *,
    implementation: str | None = None,
) -> Float[Array, "M B L D"]:
    """SiLU(bias + SUM_k kernel_k x_{l-W+k}), each channel by itself, with x = 0 where masked, whatever it holds.

    Args:
        x: the sequence, float32 or bfloat16 (XLA: any float).
        kernel: the last tap meets the present step.
        bias: added before SiLU.
        window: the W steps before x, zero where they were masked.
        mask: False where x is missing.
        implementation: "xla", "mosaic_gpu" (Pallas kernels for NVIDIA GPUs from Hopper on, which sum in float32), or
            None: see `choose_implementation`.

    Returns:
        The result in x's dtype, differentiable in x, kernel, bias and window.

    Raises:
        UnsupportedError: the named implementation is unknown or cannot be used here.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> ones = jnp.ones
        >>> y = causal_conv_silu(ones((1, 1, 3, 8)), ones((1, 2, 8)), jnp.zeros((1, 8)), jnp.zeros((1, 1, 1, 8)))
        >>> y[0, 0, :, 0].round(2).tolist() == jax.nn.silu(jnp.array([1.0, 2.0, 2.0])).round(2).tolist()
        True
    """
    name = implementation or choose_implementation(x, kernel, bias, window, mask)
    if name == "xla":
        return xla.conv_silu(x, kernel, bias, window, mask)
    if name != "mosaic_gpu":
        known = ", ".join(IMPLEMENTATIONS)
        raise UnsupportedError(f"unknown convolution implementation {name!r}; known: {known} (None picks one)")
    if why := unsupported(default_platform(), x, kernel, bias, window, mask):
        raise UnsupportedError(f"convolution 'mosaic_gpu' cannot be used here: {why}; use implementation='xla'")
    # Importing Pallas takes a third of a second, which programs on other devices need not spend.
    from pallas_kernels.causal_conv import mosaic_gpu

    return mosaic_gpu.conv_silu(None, x, kernel, bias, window, mask)


def choose_implementation(x: Array, kernel: Array, *others: Array | None) -> str:
    """The kernels where they can be used and the sequence is not very short, else XLA.

    Args:
        x: as in `causal_conv_silu`.
        kernel: likewise.
        others: the other arrays.

    Returns:
        A name of `IMPLEMENTATIONS`.
    """
    if x.shape[2] < SHORTEST or unsupported(default_platform(), x, kernel, *others):
        return "xla"
    return "mosaic_gpu"


def unsupported(platform: str, x: Array, kernel: Array, *others: Array | None) -> str | None:
    """Why the kernels cannot be used on a platform ("cpu", "gpu", "tpu"), or None if they can."""
    if platform != "gpu":
        return f"it needs an NVIDIA GPU, the default device is a {platform}"
    if why := too_old_gpu(9.0, "Hopper"):
        return why
    if axes := varying_axes((x, kernel, *others)):
        return f"inside jax.shard_map over {', '.join(sorted(axes))} it needs check_vma=False"
    return limits(x, kernel)


def limits(x: Any, kernel: Any) -> str | None:
    """Why the kernels cannot be used on any GPU, or None if they can."""
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"it takes float32 and bfloat16, got {x.dtype}"
    if not 2 <= kernel.shape[1] <= MAX_TAPS:
        return f"it takes 2 to {MAX_TAPS} taps, got {kernel.shape[1]}"
    if 0 in x.shape:
        return f"it takes no empty axes, got {x.shape}"
    return None
