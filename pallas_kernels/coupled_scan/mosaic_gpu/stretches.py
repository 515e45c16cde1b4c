"""The order in which the backward kernels walk the tiles of a chunk, and the states that enter them.

The forward pass saved the state entering every `Plan.save` steps. Such a stretch is walked once forwards, and the
states entering its tiles are noted (in device memory, where the level-2 cache keeps them; on the tensor cores in shared
memory those entering every other step); then its tiles are walked backwards. The last stretch comes first.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.coupled_scan.mosaic_gpu import blocks
from pallas_kernels.coupled_scan.mosaic_gpu import forward as fw
from pallas_kernels.coupled_scan.mosaic_gpu.plan import Plan
from pallas_kernels.coupled_scan.mosaic_gpu.tile import Refs, State


class Stretches:
    """The work of a block in order, counted in items: for each stretch its tiles but the last forwards, then all back.

    Args:
        plan: the plan.
        steps: of a tile.
        chunk: steps of a chunk.
        segment: steps of the part of it that is walked: all, or the last part but `inp["walked"]`, see `segments`.
        inp: the inputs, "saved" among them.
        out: the outputs, "entries" among them where `note` and `entry` are used.
        scr: the shared memory.

    Attributes:
        b, c, columns: sample, chunk and channels of the block.
        first: its first step.
        row: that step's among all that are walked by one launch.
        items: their number.
    """

    def __init__(self, plan: Plan, steps: int, chunk: int, segment: int, inp: Refs, out: Refs, scr: Refs):
        self.plan, self.steps, self.inp, self.out, self.scr = plan, steps, inp, out, scr
        self.b, self.c, self.columns = lax.axis_index("sample"), lax.axis_index("chunk"), blocks.my_columns(plan)
        before = (-(-chunk // segment) - 1 - inp["walked"][0]) * segment if "walked" in inp else 0
        # Segments count from the chunk's start: the last one may be shorter, and has the last rows.
        self.first, self.row = self.c * chunk + before, self.c * segment + jnp.maximum(before + segment - chunk, 0)
        self.length = jnp.clip(jnp.minimum(chunk - before, plan.L - self.first), 0, segment)
        tiles = (self.length + steps - 1) // steps
        self.tiles = plan.save // steps  # of a stretch
        self.stretches = (tiles + self.tiles - 1) // self.tiles
        self.last_tiles = tiles - (self.stretches - 1) * self.tiles
        self.last_items, self.full_items = 2 * self.last_tiles - 1, 2 * self.tiles - 1
        self.items = self.last_items + (self.stretches - 1) * self.full_items

    def fetch(self, item: Any) -> None:
        """Starts the copies of an item's tile, if there is one."""
        slot = lax.rem(item, blocks.STAGES)
        s, k, forwards = self.tile(item)

        def start(barrier: str, names: Sequence[str]) -> None:
            arrived, first = self.scr[barrier].at[slot], self.start(s, k)
            blocks.fetch(self.inp, self.scr, arrived, self.b, self.columns, first, slot, self.steps, names)

        exists = item < self.items
        pl.when(jnp.logical_and(exists, forwards))(lambda: start("rebuilt", blocks.REBUILT))
        pl.when(jnp.logical_and(exists, jnp.logical_not(forwards)))(lambda: start("arrived", blocks.FETCHED))

    def fetch_saved(self, s: Any) -> None:
        """Starts the copy of the state entering stretch s, if there is one, to the shared memory."""

        @pl.when(s >= 0)
        def _() -> None:
            saved = self.inp["saved"].at[self.start(s, 0) // self.plan.save, self.b, :, :, self.columns]
            plgpu.copy_gmem_to_smem(saved, self.scr["saved"], self.scr["entered"])

    def await_tile(self, item: Any, *, forwards: bool) -> Any:
        """Waits for an item's tile; returns its slot."""
        slot = lax.rem(item, blocks.STAGES)
        plgpu.barrier_wait(self.scr["rebuilt" if forwards else "arrived"].at[slot])
        return slot

    def tile(self, item: Any) -> tuple[Any, Any, Any]:
        """Stretch, tile within it, and whether it is walked forwards."""
        later = jnp.maximum(item - self.last_items, 0)
        in_last = item < self.last_items
        s = jnp.where(in_last, self.stretches - 1, self.stretches - 2 - later // self.full_items)
        within = jnp.where(in_last, item, lax.rem(later, self.full_items))
        count = jnp.where(in_last, self.last_tiles, self.tiles)
        forwards = within < count - 1
        return s, jnp.where(forwards, within, 2 * (count - 1) - within), forwards

    def is_last(self, s: Any, k: Any) -> Any:
        """Whether tile k is the last one of stretch s, which is walked backwards first."""
        return k == jnp.where(s == self.stretches - 1, self.last_tiles, self.tiles) - 1

    def start(self, s: Any, k: Any) -> Any:
        """First step of tile k of stretch s."""
        return self.first + (s * self.tiles + k) * self.steps

    def valid(self, start: Any) -> Any:
        """Steps of the tile that starts there; all but the last one of the sequence have `steps`."""
        whole = self.plan.L % self.steps == 0
        return self.steps if whole else jnp.minimum(self.steps, self.first + self.length - start)

    def saved(self, s: Any, slab: Any) -> State:
        """The state entering stretch s."""
        place = self.start(s, 0) // self.plan.save
        return fw.load_state(self.plan, self.inp["saved"].at[place, :, self.b, slab, :, :, self.columns])

    def entry(self, k: Any, slab: Any) -> State:
        """The state entering tile k of the stretch at hand."""
        return fw.load_state(self.plan, self._noted(k, slab))

    def note(self, k: Any, slab: Any, state: State) -> None:
        """Notes the state entering tile k."""
        fw.store_state(self.plan, self._noted(k, slab), state)

    def _noted(self, k: Any, slab: Any) -> Any:
        return self.out["entries"].at[self.c, k, :, self.b, slab, :, :, self.columns]

    def walk(
        self,
        begin: Callable[[Any, Any], Any],
        forwards: Callable[[Any, Any, Any], Any],
        backwards: Callable[[Any, Any, Any, Any], Any],
        carry: Any,
    ) -> Any:
        """What is left of `carry` after all items.

        Args:
            begin: `state = begin(s, carry)` for stretch s.
            forwards: `state = forwards(k, item, state)` for tile k of it.
            backwards: `carry = backwards(s, k, item, carry)`.
            carry: before the first item.
        """

        def one(j: Any, carry: Any) -> Any:
            s = self.stretches - 1 - j
            count = jnp.where(j == 0, self.last_tiles, self.tiles)
            item = jnp.where(j == 0, 0, self.last_items + (j - 1) * self.full_items)
            lax.fori_loop(0, count - 1, lambda k, state: forwards(k, item + k, state), begin(s, carry))
            return lax.fori_loop(
                0, count, lambda k, carry: backwards(s, count - 1 - k, item + count - 1 + k, carry), carry
            )

        return lax.fori_loop(0, self.stretches, one, carry)
