"""The coupled scan as two Pallas kernels for TPUs, one forward and one backward.

Never run on a TPU yet. Results are tested in interpret mode on a CPU, the compiled code by the TPU compiler (libtpu),
which needs no TPU: `cmamba bench tpu-static` prints what it says about instruction counts and memory.

vjp.py       problem -> arrays of the kernels -> results; the derivative rule
plan.py      sizes of tiles, and the call of a kernel
tile.py      what both kernels do with a time tile
forward.py   the forward kernel
backward.py  the backward kernel

Axes: M modality, B batch, L time, D channel, N state; S chains (1 for `shared`: H = SUM_m h^m, else M); T steps of a
time tile, at most 128; K registers of 128 channels in a block.

**Layout.** A vector register holds 8 rows of 128 lanes. Channels lie on lanes and states on rows, so a state [N, 128]
is N / 8 registers, and all of a step is elementwise in them but for two moves: B_t and C_t (a vector of N) must be
spread over the lanes, and y_t sums over the rows. x, dt, z and y stay [M, B, L, D] in HBM, blocks [M, T, K * 128] of
them stream through VMEM; B and C are transposed in VMEM, a tile at a time, to have states on rows. A and log g come
scaled by log2(e): the hardware's exponential is a power of two.

**Walk.** The grid walks blocks of channels and time tiles. Inside a tile a slab of 16 states at a time (8 where N is
no multiple of 16) goes through all steps, eight steps an iteration: the slab's states stay in registers, the rows of
dt and dt x are spread over the rows by the load itself, B and C by lane permutations once for all K registers and
the sums over rows are gathered for eight steps and done by strided loads, registers at a time.

**Where things live.** HBM: arguments, results, and the state entering each time tile but the first, which the forward
pass saves for the backward pass. VMEM: the blocks in flight, the tile's float32 dt and dt x, the carried state of
every slab; in the backward pass also the rebuilt states of one slab and the running sums of dA, dB, dC and the rest.
Nothing of size L x D x N ever exists.

**Steps that are not there** (masks, resets, the end of a last tile that L does not fill) come as flags, see
`plan.make_flags`; without them no flags are read.

Under a mesh of several devices call it inside `jax.shard_map`: the compiler cannot partition a kernel by itself.
"""

from typing import Any

import jax.numpy as jnp

from pallas_kernels.coupled_scan.types import Problem, ScanOutput

LARGEST = 8 * 1024 * (128 + 16)
"""Most M * D * (N + 16): the gradients of A, D and dt_bias are summed in VMEM, for all channels at once."""


def scan(problem: Problem, *, interpret: Any = False) -> ScanOutput:
    """Solves the problem on a TPU.

    Args:
        problem: the checked arguments.
        interpret: True or `pltpu.InterpretParams`: run the kernels step by step on any device, for tests.

    Returns:
        y and the final state.
    """
    # Importing Pallas takes a third of a second, which programs on other devices need not spend.
    from pallas_kernels.coupled_scan.mosaic_tpu import vjp

    return vjp.scan(interpret, problem)


def unsupported(problem: Problem, platform: str) -> str | None:
    """Why the kernels cannot solve a problem, or None if they can."""
    m, _, _, d = problem.x.shape
    n = problem.A.shape[-1]
    if platform != "tpu":
        return f"it needs a TPU, the default device is a {platform}"
    half = [
        name for name in ("x", "dt", "B", "C", "z") if getattr(getattr(problem, name), "dtype", None) == jnp.float16
    ]
    if half:
        return f"TPUs compute in float32 or bfloat16, {half[0]} is float16"
    if m > 8 or n > 128:
        return f"it takes up to 8 modalities and 128 states, got M={m}, N={n}"
    if m * d * (n + 16) > LARGEST:
        return f"M * D * (N + 16) may be at most {LARGEST}, got {m} * {d} * ({n} + 16)"
    return None
