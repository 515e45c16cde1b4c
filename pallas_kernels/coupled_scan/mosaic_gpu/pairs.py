"""Pairs of warpgroups for one chain H (`shared`) in bfloat16 with up to 16 states and 4 modalities.

Both work on the same channels: one scans a tile, the other prepares the steps of the next tile and finishes those of
the last one. They hand tiles over through two sets of buffers and two barriers each, "ready" and "scanned".
"""

import abc
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._compat import interpreted
from pallas_kernels.coupled_scan.mosaic_gpu import blocks, warp
from pallas_kernels.coupled_scan.mosaic_gpu import forward as fw
from pallas_kernels.coupled_scan.mosaic_gpu import tile as tl
from pallas_kernels.coupled_scan.mosaic_gpu.plan import (
    F32,
    FACTORS,
    MULTIPROCESSORS,
    SHARED_MEMORY,
    SLAB,
    Plan,
)
from pallas_kernels.coupled_scan.mosaic_gpu.tile import Refs

STAGES = 3
"""Tiles in flight or in use: one that is finished, one that is scanned, one on its way."""
SCAN_REGISTERS, OTHER_REGISTERS = 192, 64
"""Of a thread, where four warpgroups share a multiprocessor."""


class Pair(abc.ABC):
    """Two warpgroups that walk one chunk of one sample's time for one group of channels.

    Attributes:
        reverse: whether they walk it backwards.
        skipped: chunks before the first one that is walked.
    """

    reverse = False
    skipped = 0

    def __init__(
        self,
        plan: Plan,
        pairs: int,
        steps: int,
        chunk: int,
        chunks: int,
        save: int | None,
        inp: Refs,
        out: Refs,
        scr: Refs,
    ):
        self.plan, self.pairs, self.steps, self.save, self.inp, self.out = plan, pairs, steps, save, inp, out
        self.pair, self.scans = lax.rem(lax.axis_index("warpgroup"), pairs), lax.axis_index("warpgroup") < pairs
        item = lax.axis_index("block") * pairs + self.pair
        self.exists = item < plan.groups * plan.B * chunks
        self.b, self.c = lax.rem(item // plan.groups, plan.B), item // (plan.groups * plan.B)
        self.last = self.c == chunks - 1
        channels = plan.threads.channels
        self.columns = pl.ds(lax.rem(item, plan.groups) * channels, channels)
        self.first = (self.c + self.skipped) * chunk
        self.length = jnp.minimum(chunk, plan.L - self.first)
        self.tiles = (self.length + steps - 1) // steps
        barriers = ("arrived", "ready", "scanned")
        self.shared = {k: v.at[self.pair] for k, v in scr.items() if k not in barriers}
        self.barriers = {k: scr[k] for k in barriers}

    @staticmethod
    def scratch(plan: Plan, pairs: int, steps: int) -> dict[str, Any]:
        """What each of `pairs` pairs of warpgroups keeps in shared memory."""
        m, channels, strip = plan.M, plan.threads.channels, plan.threads.strip

        def smem(*shape: int, dtype: Any = F32) -> Any:
            return jax.ShapeDtypeStruct((pairs, *shape), dtype)

        large = smem(STAGES, m, steps, channels, dtype=plan.dtype)
        result = {
            "x": large,
            "dt": large,
            "B": smem(STAGES, m, steps, 1, SLAB, dtype=plan.dtype),
            "projections": smem(2, steps, 2, FACTORS, SLAB),
            "step": smem(2, steps, m, channels),
            "u": smem(2, steps, FACTORS, strip),
        }
        if plan.flagged:
            result["flags"] = smem(STAGES, steps, plan.flags)
        return result

    def barrier(self, name: str, n: Any) -> Any:
        """Of tile n, where there are two."""
        return self.barriers[name].at[self.pair * 2 + lax.rem(n, 2)]

    def start(self, n: Any) -> Any:
        """First step of tile n."""
        return self.first + (self.tiles - 1 - n if self.reverse else n) * self.steps

    def tile(self, n: Any) -> Refs:
        """The shared memory of tile n; what is in flight keeps its axis of stages."""
        worked = ("projections", "step", "u", "y", "BC")
        slot = lax.rem(n, 2)
        return {k: v.at[slot] if k in worked else v for k, v in self.shared.items()}

    def walk(self) -> None:
        """What a warpgroup does."""

        @pl.when(jnp.logical_and(self.exists, self.scans))
        def _() -> None:
            if self.pairs == 2:
                plgpu.set_max_registers(SCAN_REGISTERS, action="increase")
            self.scan()

        @pl.when(jnp.logical_and(self.exists, jnp.logical_not(self.scans)))
        def _() -> None:
            if self.pairs == 2:
                plgpu.set_max_registers(OTHER_REGISTERS, action="decrease")
            self.prepare_and_finish()

    def prepare_and_finish(self) -> None:
        """Everything that is done once a channel and step."""
        plan, inp, steps, tiles = self.plan, self.inp, self.steps, self.tiles

        def arrived(slot: Any) -> Any:
            return self.barriers["arrived"].at[self.pair * STAGES + slot]

        def fetch(n: Any, slot: Any) -> None:
            @pl.when(n < tiles)
            def _() -> None:
                blocks.fetch(inp, self.shared, arrived(slot), self.b, self.columns, self.start(n), slot, steps)

        def prepare(n: Any, slot: Any) -> None:
            @pl.when(n < tiles)
            def _() -> None:
                scr = self.tile(n)
                plgpu.barrier_wait(arrived(slot))
                self.prepare(scr, slot)
                tl.convert_projections(plan, inp, scr, slot, 0, steps)
                plgpu.barrier_arrive(self.barrier("ready", n))

        def tile(n: Any, slot: Any) -> Any:
            """Tile n, which lies in `slot`: a remainder by three takes a dozen instructions, counting on three."""
            following = jnp.where(slot == STAGES - 1, 0, slot + 1)
            prepare(n + 1, following)
            plgpu.barrier_wait(self.barrier("scanned", n))
            self.finish(n, slot)
            fetch(n + STAGES, slot)
            return following

        lax.fori_loop(0, STAGES, lambda n, _: fetch(n, n), None)
        for n in range(2):
            tl.clear_factors(plan, self.tile(n), steps)
        prepare(0, 0)
        lax.fori_loop(0, tiles, tile, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    def prepare(self, scr: Refs, slot: Any) -> None:
        """What the scan of a tile needs once a channel and step."""
        fw.prepare_steps(self.plan, self.inp, scr, self.columns, slot, self.steps)

    @abc.abstractmethod
    def finish(self, n: Any, slot: Any) -> None:
        """What is left to do with tile n, which lies in `slot`, once it is scanned."""

    @abc.abstractmethod
    def scan(self) -> None:
        """The recurrence, tile by tile."""

    def each_tile(self, scan_tile: Any, state: Any) -> Any:
        """The state after `state = scan_tile(n, state)` for every tile."""

        def tile(n: Any, state: Any) -> Any:
            plgpu.barrier_wait(self.barrier("ready", n))
            state = scan_tile(n, state)
            plgpu.barrier_arrive(self.barrier("scanned", n))
            return state

        return lax.fori_loop(0, self.tiles, tile, state)

    def steps_of(self, n: Any) -> Any:
        """Steps of tile n; all but the last in time have `steps`."""
        whole = self.plan.L % self.steps == 0
        return self.steps if whole else jnp.minimum(self.steps, self.first + self.length - self.start(n))

    def load_C(self, scr: Refs, t: Any) -> list[list[jax.Array]]:
        """C of every modality at step t."""
        t = jnp.clip(t, 0, self.steps - 1)
        return [warp.load_projection(self.plan, scr["projections"].at[t, 1, m]) for m in range(self.plan.M)]


def launch(
    plan: Plan,
    name: str,
    kind: type[Pair],
    arrays: dict[str, jax.Array],
    out: dict[str, Any],
    chunk: int,
    chunks: int,
    save: int | None = None,
) -> dict[str, jax.Array]:
    """Runs a pair of warpgroups for every group of channels, sample and chunk; if there are many, two make a block.

    Args:
        plan: the plan.
        name: what profiles show.
        kind: what the pairs do.
        arrays: inputs.
        out: shapes and dtypes of the outputs.
        chunk: steps a chunk.
        chunks: of time.
        save: steps between saved states; None: save nothing.

    Returns:
        The outputs by name.
    """
    items = plan.groups * plan.B * chunks
    pairs = 2 if items > MULTIPROCESSORS else 1
    shared = next(
        shared
        for steps in (16, 8, 4)
        if sum(map(blocks.size, (shared := kind.scratch(plan, pairs, steps)).values())) <= SHARED_MEMORY - 1024
    )
    steps = shared["dt"].shape[3]
    names, split = [*arrays, *out], (plan.threads.lanes, plan.threads.rows)
    types = {k: jax.ShapeDtypeStruct(blocks.split_states(v.shape, k, split), v.dtype) for k, v in out.items()}
    copies = sum(key in shared for key in blocks.FETCHED)

    def kernel(*refs: Any, **scratch_refs: Any) -> None:
        refs = dict(zip(names, refs, strict=True))
        inp, results = {k: refs[k] for k in arrays}, {k: refs[k] for k in out}
        with interpreted(bool(plan.interpret)):
            kind(plan, pairs, steps, chunk, chunks, save, inp, results, scratch_refs).walk()

    call = plgpu.kernel(
        kernel,
        out_type=tuple(types.values()),
        scratch_types={k: plgpu.SMEM(v.shape, v.dtype) for k, v in shared.items()}
        | {
            "arrived": plgpu.Barrier(num_arrivals=copies, num_barriers=pairs * STAGES),
            "ready": plgpu.Barrier(num_barriers=pairs * 2),
            "scanned": plgpu.Barrier(num_barriers=pairs * 2),
        },
        grid=(-(-items // pairs),),
        grid_names=("block",),
        num_threads=2 * pairs,
        thread_name="warpgroup",
        compiler_params=blocks.LANES,
        kernel_name=name,
        interpret=plan.interpret,
    )
    results = call(*(blocks.reshape_states(v, k, split) for k, v in arrays.items()))
    return {k: v.reshape(out[k].shape) for k, v in zip(out, results, strict=True)}
