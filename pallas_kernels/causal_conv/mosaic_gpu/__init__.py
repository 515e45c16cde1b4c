"""The causal convolution with SiLU as Pallas kernels for NVIDIA GPUs of the Hopper generation and newer.

Axes: M modality, B batch, L time, D channel, K taps, W = K - 1; T steps of a tile.

block.py     sizes, launch, copies, and what both kernels read
forward.py   the forward kernel
backward.py  the backward kernel

It is bound by memory. A block is one warpgroup (128 threads) with one tile at a time: T steps of 64 channels of one
sample, which arrive by the copy engine together with the steps around them. Eleven blocks, backwards seven, fit into a
multiprocessor (bfloat16, 4 taps): some wait for tiles while others compute. A thread has 2 adjacent channels and RUN
consecutive steps of them; it walks them with the last K inputs (backwards also the last K gradients before SiLU) in
registers, so every input is read from shared memory about once, and threads need not talk to each other.

Backwards a tile also reads the W steps after it, whose gradients its inputs get, and finds them again instead of
passing them on: W steps for each run of RUN are computed twice. The gradients of kernel and bias leave as one sum
a block, which XLA adds up: no atomic operations, the same bits in every run. The window reaches only the first W steps;
its gradient is left to XLA.

Copies of tiles that are contiguous in device memory become plain copies in Pallas, which do not stop at the end of a
sample or of its channels. `Plan` makes no such tiles: 64 channels are padded, and no copy is of a single step.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.causal_conv import xla
from pallas_kernels.causal_conv.mosaic_gpu import backward, forward
from pallas_kernels.causal_conv.mosaic_gpu.block import CHANNELS, MARGIN, STEPS, Plan
from pallas_kernels.coupled_scan.mosaic_gpu.plan import F32, pad_axis

Array = jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def conv_silu(interpret: Any, x: Array, kernel: Array, bias: Array, window: Array, mask: Array | None) -> Array:
    """Computes what `causal_conv_silu` does; `interpret`: see `Plan`."""
    plan = Plan.of(x, kernel, mask, interpret)
    y = forward.run(plan, prepare(plan, x, kernel, bias, window, mask))
    return y.reshape(*x.shape[:3], plan.D)[..., : x.shape[3]]


def _forward_rule(interpret: Any, *arguments: Any) -> tuple[Array, tuple]:
    return conv_silu(interpret, *arguments), arguments


def _backward_rule(interpret: Any, arguments: tuple, dy: Array) -> tuple:
    x, kernel, bias, window, mask = arguments
    d, taps = x.shape[3], kernel.shape[1]
    plan = backward.plan_of(Plan.of(x, kernel, mask, interpret))
    arrays = prepare(plan, x, kernel, bias, window, mask)
    arrays["dy"] = pad_axis(dy, 3, plan.D).reshape(-1, plan.L, plan.D)
    dx, sums = backward.run(plan, arrays)
    dx = dx.reshape(*x.shape[:3], plan.D)[..., :d]
    sums = jnp.sum(sums.reshape(plan.M, plan.chunks, *sums.shape[1:]), axis=1)[..., :d]
    # The window reaches no further than the first W steps.
    first = [None if v is None else v[:, :, : taps - 1] for v in (x, mask)]
    _, pull = jax.vjp(lambda window: xla.conv_silu(first[0], kernel, bias, window, first[1]), window)
    (dwindow,) = pull(dy[:, :, : taps - 1])
    dmask = None if mask is None else np.zeros(mask.shape, jax.dtypes.float0)
    return dx, sums[:, :-1].astype(kernel.dtype), sums[:, -1].astype(bias.dtype), dwindow, dmask


conv_silu.defvjp(_forward_rule, _backward_rule)


def prepare(plan: Plan, x: Array, kernel: Array, bias: Array, window: Array, mask: Array | None) -> dict[str, Array]:
    """The arrays of the kernels.

    Returns:
        x [M B, L, D] and window [M B, halo, D]; taps float32 [M, K + 1, D'], the bias last and the channels padded to
        whole blocks; mask float32 [M B, MARGIN + tiles T + MARGIN], 1 around the sequence.
    """
    window = pad_axis(window.astype(plan.dtype), 3, plan.D)
    window = jnp.pad(window, ((0, 0), (0, 0), (plan.halo - window.shape[2], 0), (0, 0)))
    taps = jnp.concatenate([kernel.astype(F32), bias.astype(F32)[:, None]], axis=1)
    arrays = {
        "x": pad_axis(x, 3, plan.D).reshape(-1, plan.L, plan.D),
        "window": window.reshape(-1, plan.halo, plan.D),
        "taps": pad_axis(taps, 2, plan.groups * CHANNELS),
    }
    if mask is not None:
        margins = ((0, 0), (MARGIN, MARGIN + plan.tiles * STEPS - plan.L))
        arrays["mask"] = jnp.pad(mask.reshape(-1, plan.L).astype(F32), margins, constant_values=1)
    return arrays
