"""How the convolution is cut into blocks and tiles, how a kernel is launched, and what a block does in both passes."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._compat import interpreted, is_interpreted, layout_cast, load
from pallas_kernels.coupled_scan.mosaic_gpu import tile as tl
from pallas_kernels.coupled_scan.mosaic_gpu.blocks import LANES
from pallas_kernels.coupled_scan.mosaic_gpu.plan import F32, Threads

Array = jax.Array
Refs = dict[str, Any]

CHANNELS = 64
"""Of a block."""
RUNS, RUN = 4, 16
"""Runs of a tile, and consecutive steps of a run."""
STEPS = RUNS * RUN
"""T."""
AT_ONCE = 4
"""Steps of a run that are loaded at once; the compiler takes too many registers for a whole run without a loop."""
BEFORE = 8
"""Rows of shared memory in front of a tile's inputs, the last of which are the steps before it."""
ALIGNED = 8
"""Channels are padded to a multiple: 16 bytes of the narrowest type, which copies to shared memory need."""
MARGIN = 32
"""Steps of the mask around a tile: copies move multiples of 128 bytes."""
LAYOUT = Threads().over_steps(RUNS)
"""[RUNS, CHANNELS], the same step of every run; each element in one thread."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static facts of one problem.

    Attributes:
        M, B, L: sizes of the problem's axes.
        D: channels of x, y and their gradients in device memory.
        K: taps.
        dtype: of x.
        masked: whether a mask is given.
        interpret: what `plgpu.kernel` takes: None on a GPU.
        per_block: tiles that a block works on one after the other.
    """

    M: int
    B: int
    L: int
    D: int
    K: int
    dtype: Any
    masked: bool
    interpret: Any = None
    per_block: int = 1

    @classmethod
    def of(cls, x: Array, kernel: Array, mask: Array | None, interpret: Any) -> "Plan":
        """The plan of a problem."""
        m, b, length, d = x.shape
        d = -(-d // ALIGNED) * ALIGNED
        d = d + ALIGNED if d == CHANNELS else d  # or tiles would be contiguous
        return cls(m, b, length, d, kernel.shape[1], x.dtype, mask is not None, interpret)

    @property
    def halo(self) -> int:
        """Steps that a tile reads before itself, and backwards also after itself: W, but no single, contiguous one."""
        return max(2, self.K - 1)

    @property
    def tiles(self) -> int:
        """Of a sample."""
        return -(-self.L // STEPS)

    @property
    def chunks(self) -> int:
        """Blocks that the tiles of all samples of a modality make, for each group of channels."""
        return -(-self.B * self.tiles // self.per_block)

    @property
    def groups(self) -> int:
        """Of channels, each a block's."""
        return -(-self.D // CHANNELS)


def launch(
    plan: Plan,
    name: str,
    body: Callable[[Plan, Refs, Refs, Refs], None],
    arrays: dict[str, Array],
    out: dict[str, Any],
    rows: dict[str, int],
) -> tuple[Array, ...]:
    """Runs `body(plan, inputs, outputs, shared memory)` in every block; `rows` of a tile lie in shared memory."""
    names = (*arrays, *out)
    scratch = {k: plgpu.SMEM((count, CHANNELS), plan.dtype) for k, count in rows.items()}
    if plan.masked:
        scratch["mask"] = plgpu.SMEM((MARGIN + STEPS + MARGIN,), F32)
    copies = 2 + ("dy" in rows) + plan.masked

    def kernel(*refs: Any, **scratch_refs: Any) -> None:
        refs = dict(zip(names, refs, strict=True))
        with interpreted(bool(plan.interpret)):
            body(plan, {k: refs[k] for k in arrays}, {k: refs[k] for k in out}, scratch_refs)

    return plgpu.kernel(
        kernel,
        out_type=tuple(out.values()),
        scratch_types=scratch | {"arrived": plgpu.Barrier(num_arrivals=copies)},
        # Neighbouring blocks read neighbouring channels, then neighbouring tiles.
        grid=(plan.M * plan.chunks * plan.groups,),
        grid_names=("block",),
        compiler_params=LANES,
        kernel_name=name,
        interpret=plan.interpret,
    )(*arrays.values())


class Block:
    """What a block works on, and its shared memory.

    Attributes:
        index: m chunks + chunk.
        modality: m.
        columns: its channels.
        first: its first tile of all of a modality's, b tiles + tile.
        taps: K + 1 arrays [RUNS, CHANNELS], the bias last.
    """

    def __init__(self, plan: Plan, inp: Refs, scr: Refs):
        """Fetches the first tile, then the taps."""
        block = lax.axis_index("block")
        self.plan, self.inp, self.scr = plan, inp, scr
        self.index = lax.div(block, plan.groups)
        self.columns = pl.ds(lax.rem(block, plan.groups) * CHANNELS, CHANNELS)
        self.modality = lax.div(self.index, plan.chunks)
        self.first = lax.rem(self.index, plan.chunks) * plan.per_block
        self.fetch(self.first)
        taps = inp["taps"].at[self.modality]
        self.taps = [self._spread(load(taps.at[k, self.columns], LAYOUT.reduce(0)), 1) for k in range(plan.K + 1)]

    def place(self, tile: Any) -> tuple[Any, Any]:
        """m B + b, and the first step."""
        sample = self.modality * self.plan.B + lax.div(tile, self.plan.tiles)
        return sample, lax.rem(tile, self.plan.tiles) * STEPS

    def fetch(self, tile: Any) -> None:
        """Starts the copies to shared memory; what lies beyond the arrays arrives as zeros."""
        (sample, first), scr = self.place(tile), self.scr
        halo = self.plan.halo

        def copy(name: str, rows: Any, target: Any) -> None:
            plgpu.copy_gmem_to_smem(self.inp[name].at[sample, rows, self.columns], target, scr["arrived"])

        count = STEPS + halo if "dy" in scr else STEPS
        before = scr["x"].at[pl.ds(BEFORE - halo, halo)]
        copy("x", pl.ds(first, count), scr["x"].at[pl.ds(BEFORE, count)])
        if "dy" in scr:
            copy("dy", pl.ds(first, count), scr["dy"].at[pl.ds(0, count)])
        pl.when(first == 0)(lambda: copy("window", pl.ds(0, halo), before))
        pl.when(first > 0)(lambda: copy("x", pl.ds(first - halo, halo), before))
        if self.plan.masked:
            mask = self.inp["mask"].at[sample, pl.ds(first, MARGIN + STEPS + MARGIN)]
            plgpu.copy_gmem_to_smem(mask, scr["mask"], scr["arrived"])

    def send(self, name: str, ref: Any, tile: Any) -> None:
        """Starts the copy of results to device memory, up to the arrays' ends."""
        sample, first = self.place(tile)
        plgpu.copy_smem_to_gmem(self.scr[name], ref.at[sample, pl.ds(first, STEPS), self.columns])

    def _spread(self, values: Array, axis: int) -> Array:
        return layout_cast(lax.broadcast_in_dim(values, (RUNS, CHANNELS), (axis,)), LAYOUT)

    def at(self, name: str, row: Any) -> Any:
        """The reference to row `row` of every run in shared memory."""
        ref = self.scr[name]
        if is_interpreted():
            return ref.at[pl.ds(row, RUNS, stride=RUN)]
        return ref.reshape(ref.shape[0] // RUN, RUN, *ref.shape[1:]).at[pl.ds(row // RUN, RUNS), row % RUN]

    def present(self, i: Any, values: Array) -> Array:
        """Values of step i of every run, zero where masked."""
        if not self.plan.masked:
            return values
        mask = self._spread(load(self.at("mask", MARGIN + i), LAYOUT.reduce(1)), 0)
        return jnp.where(mask > 0, values, jnp.zeros_like(values))

    def inputs(self, i: Any) -> Array:
        """Step i of every run of x, zero where masked; from -W on."""
        return self.present(i, load(self.at("x", BEFORE + i), LAYOUT).astype(F32))

    def before_silu(self, recent: list[Array]) -> Array:
        """The convolution from the last K inputs."""
        return tl.total([self.taps[-1], *(w * x for w, x in zip(self.taps[:-1], recent, strict=True))])
