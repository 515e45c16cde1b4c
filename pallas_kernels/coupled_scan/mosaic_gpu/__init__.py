"""The coupled scan as Pallas kernels for NVIDIA GPUs of the Hopper generation and newer, forward and backward.

vjp.py             problem -> arrays of the kernels -> results; the derivative rule
plan.py            sizes, layouts over the threads, and the rules that cut time into chunks and choose a forward kernel
tile.py            what the kernels do alike: loads, elementwise maths, one step
warp.py            the same below Pallas: vectors of a thread, and what they are built of
mma.py             the tensor cores' instruction
tensor.py          products by it
channel_sums.py    sums over channels by it
blocks.py          how a kernel is launched, and how its blocks fetch their tiles
forward.py         the forward kernel
forward_tensor.py  the forward kernel on the tensor cores: the paper's case in bfloat16
pairs.py           its pairs of warpgroups
backward.py        the backward kernel
backward_tensor.py the backward kernel on the tensor cores
segments.py        its launches, one for each segment of time
stretches.py       the order in which both walk their tiles, and the states that enter them
sums.py            their running sums of the parameters' gradients
chunks.py          what enters chunks of time that run at once
summary_tensor.py  the same on the tensor cores

Axes: M modality, B batch, L time, D channel, N state; S chains (1 for `shared`: H = SUM_m h^m, else M).

**Work of a thread.** A block is one warpgroup (128 threads) with 64 channels of one sample and one chunk of time. A
thread carries 8 states of one channel, two half-warps share the channels' 16 states (`plan.Threads`); more states are
walked slab by slab, fewer are filled up with zeros. Everything of a step is elementwise in registers, but for y, whose
halves meet in shared memory, and (backwards) the sums over channels for dB and dC, which the tensor cores take.

**Walk of a tile.** Tiles of 8 or 16 steps arrive by the copy engine, two in flight. What is needed once a channel
and step (softplus, dt x, gates, skip, all conversions) is done with every element in one thread and passed to the scan
through shared memory as float32; so the scan's inner loop is 6.3 instructions for each state and modality, one of them
the exponential: exp2(dt A' + log2 g), a product with the state and one with B, a sum into H, one into y.

**On the tensor cores** (`shared`, bfloat16, up to 16 states and 4 modalities). A thread has 4 states of 2 neighbouring
channels, four neighbouring threads the 16 states of a channel: what the instruction m16n8k8 takes as A and gives as
result. The sum of u_m B_m over the modalities, of rank M, is two products, the sum of C_m g_m a_m H over the states two
for each m; u_m SUM_n B_mn C_mn is added where y is gated. Left are 4 instructions for each state and modality, 121 in
all instead of 165 for 24 of them. Factors have 11 bits: B and C are exact in them, u is rounded, g a H is cut off.
A pair of warpgroups shares the work: one only scans, the other prepares and finishes tiles (`pairs`); two pairs make
a block, so that registers can be moved to those that scan.
Backwards (gated only) a warpgroup does everything, two steps at a time. Of the states only those entering every other
step are noted, as bfloat16 in shared memory; the one between is found again from the decays of the first step, which
are kept for when its turn comes, and are computed while the step after it is walked. So a decay is computed twice, once
forwards and once backwards. The adjoint takes 318 instructions a thread and step instead of 456, finding the next state
again 89 instead of 138. The sums over channels for dB and dC are products in bfloat16 whose factors are turned by
`movmatrix`, since the states lie where the tensor cores want what they add up; those for d(log g) are products with the
unit matrix, which add a thread's channels to running sums.

**Where things live.** Registers: the states, A and log g of the thread, in the backward pass also the running sums of
dA and d(log g). Shared memory: tiles in flight, the tile's dt, dt x, B and C, halves of y; backwards the state entering
each step of a tile (on the tensor cores every other step of 32) and the partial sums of dx, ddt and y. Device memory:
arguments and results, the state entering every 128 steps (saved by the forward pass; on the tensor cores every 32, as
bfloat16), without tensor cores that entering each tile of the stretch at hand (written and read again by the backward
pass), and sums of dB and dC for each group of 64 channels. Those would be 17% of the inputs at S2, so that the backward
pass is launched for up to six segments of time, the last one first, and adds the groups' sums up after each
(`segments`): 9.5% extra memory in all instead of 23%, and 20 microseconds more for each. Everything else is written in
place, and the adjoint handed on. Nothing of size L x D x N, no atomic operation.

**Time in chunks.** Where B x D gives fewer blocks than multiprocessors, time is cut (`Plan.chunks`): a kernel finds
each chunk's end state from zero and the product of its decays, a prefix over the chunks gives the entering states. The
one chain H of `shared` makes that one product a state, whatever M is. Forwards, blocks of 32 channels save that pass
where they fill the chip (`Plan.forward`): S3 0.54 ms instead of 0.74.

Many modalities and states (`full` with four of 64 states or more, say) leave no room for the states in shared memory:
those that a tile notes or hands on to the next one lie in device memory then (`Tiling.tight`).

**Barriers.** Warps that only read what others wrote wait for each other and nothing else (`tile.sync`); before a tile
is copied out they also wait until all they have loaded and stored is done (`tile.commit`). Each copy to shared memory
costs its warp some 20 instructions, so the warps share them out (`blocks.fetch`).

**Copies out** of a tile that is contiguous in device memory become plain copies in Pallas, which stop neither at the
end of a sample nor at that of its channels. `Plan.rows` and `Plan.forward` keep such tiles from reaching beyond.

**What binds, and what was tried** (S2 on an H100, ms, unless said, in runs of ten calls, shorter than those of README's
table). Forward: 28 of 184 instructions a thread and step are the special-function unit's,
which takes eight times as long for one: it is busy for three quarters of the time, the schedulers for 60%. A scanning
warp waits 26% of its time for that unit, 18% for another warp's turn and 20% for its own last instruction.

- The scan without tensor cores (`forward`, still that of the other cases): 0.80; S3 0.60, S4 2.82.
- Tensor cores, but the same warps prepare, scan and finish: 0.79; S3 0.71, S4 2.9. Warps wait instead of counting.
- One warpgroup scans, another prepares and finishes: 0.77; S3 0.54, S4 2.67, with the summary too 2.54 (kept).
- Two warpgroups scan 32 channels each, a third prepares and finishes: 0.82 instead of 0.73, S4 2.66 instead of 2.42.
- Four or two steps an iteration of the scan instead of eight: 0.72 and 0.74 instead of 0.72.
- Two of the 24 powers of two a step by a polynomial instead of the special-function unit: 0.79, four 0.83, six 0.85.
- The logarithm of softplus by a polynomial: 0.79; S3 0.56.
- Twice as many chunks: S4 2.57.
- Neighbouring bfloat16 widened by one instruction each, SiLU from half its argument, slots of tiles counted instead of
  divided by three: 536 to 485 instructions a tile for what is not scanned, 0.71 to 0.70 (kept).
- In `forward`: B and C as 16 bits from shared memory, 5 to 7% slower; one barrier a tile instead of two, 8% (S3).
- In `forward`, with several slabs of states: B and C of all of them converted at once, no barriers between slabs: S1
  1.18 instead of 1.22 (kept).

Backward without tensor cores (`backward`), 3.5: 456 instructions a thread and step, and twice 138 to find the states.

- 4 states a thread: 5.3 instead of 4.1, shared memory becomes the limit.
- B and C loaded four at a time: 2 to 4% faster (kept). As 16 bits: no difference.
- Loads of the next step before the stores of this one: 7 to 10% slower, they queue up.
- Sums of dB and dC over clusters of 2 blocks +7%, of 4 blocks +70% (they do not all fit onto the chip at once).
- log g in shared memory, or two steps an iteration: no difference.

Backward on the tensor cores (`backward_tensor`), 2.5: about 570 instructions a thread and step. A multiprocessor has
two warps a scheduler, which issues one in two cycles. The walk backwards has 56% of the instructions and about 45% of
the time, the walk forwards 15% and 15% (96 of its 357 instructions are the special-function unit's, 8 cycles each),
what is done once a channel and step 28% and a third. Forward + backward at S2 (3.5 before the first of these):

- States of every other step noted, but in device memory: 3.5. One walk forwards of two is gone, but the loads are
  waited for.
- The same in shared memory: 3.33. For that the forward pass saves states four times as often, as bfloat16; and hardly a
  kilobyte more fits if two blocks shall share a multiprocessor: with 2 kB more it takes 4.1.
- d(log g), B times the adjoint and the sums for skip and dt_bias in fewer instructions and registers: 3.26.
- Decays of a pair's first step computed while the pair before is walked: 3.23, though those of a tile's first pair are
  computed once too often. Without that, by a branch 3.43, by a copy of the code 3.37; the second step's as well 3.52.
- bfloat16 widened as above: 3.26 to 3.18 (kept). Eight segments of time 3.17, four 3.12, one 3.11, with 8.8, 10.8 and
  22.6% extra memory (six kept: 9.5%).
- The four pairs of a tile written out instead of a loop, which saves 5% of the instructions: 3.50, two pairs 3.53;
  perhaps for the code's size, 40 and 20 kB instead of 10.
- Sums of each pair of products of A kept apart for the tensor cores, to shorten their chain: 3% more instructions.
- One launch, whose blocks wait for each other's sums in device memory: not run, would save up to 0.1 and hang where not
  all blocks of a sample fit onto the chip at once.
- Something that keeps the compiler from computing a step's powers of two at once: 3.29. Two of 24 of them by a
  polynomial in the walks forwards: 3.21, six not run.
- One warpgroup walks backwards, another finds states, prepares and finishes: backward pass 3.8 instead of 3.0. One
  walks, another prepares and finishes: not run, 1059 instructions (tiles of 4 steps are all that fits). Two with 32
  channels each, 4 warps a scheduler: 3.9, 128 registers are too few.
- dt_bias and skip loaded before waiting, the next tile fetched after the walk has begun: 3.1 to 3.0 (kept). dt_bias
  kept from one tile's end for the next one's beginning, B and C loaded for all modalities before the first is stored,
  no waiting for device memory at barriers, copies shared by the warps: 3.0 to 2.8 (kept).
- The second block of a multiprocessor started 2 to 60 microseconds later, to mix its phases: no difference.
- ybar as the other factor of dC instead of multiplied before: fewer instructions, but longer waits for `movmatrix`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.coupled_scan.types import Independent, Problem, ScanOutput
from pallas_kernels.coupled_scan.varying import varying_axes
from pallas_kernels.platform import too_old_gpu

MAX_MODALITIES, MAX_STATES = 8, 128


def scan(problem: Problem, *, interpret: Any = None) -> ScanOutput:
    """Solves the problem on a GPU.

    Args:
        problem: the checked arguments.
        interpret: `pallas_kernels._compat.interpret_params()`: run the kernels step by step on any device, for tests.

    Returns:
        y and the final state.
    """
    # Importing Pallas takes a third of a second, which programs on other devices need not spend.
    from pallas_kernels.coupled_scan.mosaic_gpu import vjp

    if not _by_modality(problem):
        return vjp.scan(interpret, problem)
    parts = [vjp.scan(interpret, _modality(problem, m)) for m in range(problem.x.shape[0])]
    return jax.tree.map(lambda *values: jnp.concatenate(values), *parts)


def _by_modality(p: Problem) -> bool:
    """Whether the modalities are scanned one after the other: without coupling, where together they would be tight."""
    from pallas_kernels.coupled_scan.mosaic_gpu import backward
    from pallas_kernels.coupled_scan.mosaic_gpu.plan import Plan

    separate = isinstance(p.coupling, Independent) and p.readout == "per_modality" and p.x.shape[0] > 1
    return separate and backward.choose_tiling(Plan.of(p)).tight


def _modality(p: Problem, m: int) -> Problem:
    """The problem of one modality of an uncoupled problem."""
    shared = {"coupling": p.coupling, "reset": p.reset, "dt_softplus": p.dt_softplus, "readout": p.readout}
    fields = {f.name: getattr(p, f.name) for f in dataclasses.fields(p) if f.name not in shared}
    return Problem(**{name: None if value is None else value[m : m + 1] for name, value in fields.items()}, **shared)


def unsupported(problem: Problem, platform: str) -> str | None:
    """Why the kernels cannot solve a problem, or None if they can."""
    if platform != "gpu":
        return f"it needs an NVIDIA GPU, the default device is a {platform}"
    if why := too_old_gpu(9.0, "Hopper"):
        return why
    if axes := varying_axes([leaf for leaf in jax.tree.leaves(problem) if isinstance(leaf, jax.Array)]):
        return f"inside jax.shard_map over {', '.join(sorted(axes))} it needs check_vma=False"
    return limits(problem)


def limits(problem: Problem) -> str | None:
    """Why the kernels cannot solve a problem on any GPU, or None if they can."""
    m, n = problem.x.shape[0], problem.A.shape[-1]
    if m > MAX_MODALITIES or n > MAX_STATES:
        return f"it takes up to {MAX_MODALITIES} modalities and {MAX_STATES} states, got M={m}, N={n}"
    return None
