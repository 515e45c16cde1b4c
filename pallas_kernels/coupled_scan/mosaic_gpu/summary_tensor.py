"""Summaries of chunks by pairs of warpgroups: `shared`, bfloat16, up to 16 states and 4 modalities (see `chunks`)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.coupled_scan.mosaic_gpu import forward as fw
from pallas_kernels.coupled_scan.mosaic_gpu import tensor
from pallas_kernels.coupled_scan.mosaic_gpu import tile as tl
from pallas_kernels.coupled_scan.mosaic_gpu.pairs import STAGES, Pair, launch
from pallas_kernels.coupled_scan.mosaic_gpu.plan import F32, SLAB, Plan
from pallas_kernels.coupled_scan.mosaic_gpu.tile import Refs, State


@functools.partial(jax.jit, static_argnames=("plan", "chunk", "count", "reverse"))
def run(plan: Plan, arrays: dict[str, jax.Array], chunk: int, count: int, *, reverse: bool) -> dict[str, jax.Array]:
    """The "product" of the decays and the "rest", the end state from zero, of the first `count` chunks.

    With `reverse` of the adjoint, of all chunks but the first. Both [count, 1, B, 1, SLAB, D'].
    """
    shape = jax.ShapeDtypeStruct((count, 1, plan.B, 1, SLAB, plan.padded), F32)
    name = "coupled_scan_adjoint_summary" if reverse else "coupled_scan_summary"
    kind = _Adjoint if reverse else _Summary
    return launch(plan, f"{name}_tensor", kind, arrays, {"product": shape, "rest": shape}, chunk, count)


class _Summary(Pair):
    """The pair of the forward direction."""

    def finish(self, n: Any, slot: Any) -> None:
        """Nothing but to wait for the other warps, whose tile will be overwritten."""
        del n, slot
        tl.sync()

    def scan(self) -> None:
        """Both recurrences."""
        constants = tl.Constants(self.plan, self.inp, 0, self.columns)
        initial = tuple([[tl.fill(self.plan, v)] * self.plan.threads.rows] for v in (1.0, 0.0))
        product, rest = self.each_tile(lambda n, carry: self.scan_tile(n, constants, carry), initial)
        fw.store_state(self.plan, self.out["product"].at[self.c, :, self.b, 0, :, :, self.columns], product)
        fw.store_state(self.plan, self.out["rest"].at[self.c, :, self.b, 0, :, :, self.columns], rest)

    def scan_tile(self, n: Any, constants: tl.Constants, carry: tuple[State, State]) -> tuple[State, State]:
        """The steps of tile n."""
        plan, scr, slot = self.plan, self.tile(n), lax.rem(n, STAGES)

        def step(t: Any, carry: tuple) -> tuple:
            product, rest, dt, factors, added = carry
            following = tl.load_dt(plan, scr, t + 1), tl.load_factors(plan, scr, t + 2)
            product, rest = (tl.reset_state(plan, scr, slot, t, v) for v in (product, rest))
            product, rest = self.advance(slot, t, self.total(constants.decays(dt)), [added], product, rest)
            return product, rest, *following, tensor.outer_products(plan, *factors)

        added = tensor.outer_products(plan, *tl.load_factors(plan, scr, 0))
        carry = (*carry, tl.load_dt(plan, scr, 0), tl.load_factors(plan, scr, 1), added)
        return fw.walk_steps(self.steps_of(n), min(8, self.steps), step, carry)[:2]

    def total(self, values: State) -> State:
        """Sum over the modalities."""
        return [[tl.total([row[i] for row in values]) for i in range(self.plan.threads.rows)]]

    def advance(
        self, slot: Any, t: Any, decays: State, added: State, product: State, rest: State
    ) -> tuple[State, State]:
        """One step of the chain."""
        plan, scr = self.plan, self.shared
        new_product = tl.map_state(jnp.multiply, decays, product)
        new_rest = tl.map_state(lambda a, v, u: a * v + u, decays, rest, added)
        product = tl.hold_state(plan, scr, slot, t, product, new_product)
        return product, tl.hold_state(plan, scr, slot, t, rest, new_rest)


class _Adjoint(_Summary):
    """The pair of the backward direction, whose "u" is the gradient of y before the gate."""

    reverse = True
    skipped = 1

    @staticmethod
    def scratch(plan: Plan, pairs: int, steps: int) -> dict[str, Any]:
        """With dy, z and C in place of x and B."""
        result = Pair.scratch(plan, pairs, steps)
        result |= {"dy": result.pop("x"), "C": result.pop("B")}
        if plan.gate:
            result["z"] = result["dy"]
        return result

    def prepare(self, scr: Refs, slot: Any) -> None:
        """dt, and the gradient of y before the gate."""
        fw.prepare_adjoint(self.plan, self.inp, scr, self.columns, slot, self.steps)

    def scan_tile(self, n: Any, constants: tl.Constants, carry: tuple[State, State]) -> tuple[State, State]:
        """The steps of tile n, last first."""
        plan, scr, slot, rows = self.plan, self.tile(n), lax.rem(n, STAGES), range(self.plan.threads.rows)
        here, modalities = self.steps_of(n), range(self.plan.M)

        def load(t: Any) -> tuple:
            at = jnp.clip(t, 0, self.steps - 1)
            channels = pl.ds(0, plan.threads.channels)
            ybar = [tl.load_channels(plan, scr["u"].at[at, m, channels]) for m in modalities]
            return tl.load_dt(plan, scr, t), ybar, self.load_C(scr, t)

        def step(r: Any, carry: tuple) -> tuple:
            product, rest, (dt, ybar, C) = carry
            t = here - 1 - r
            following = load(t - 1)
            decays = constants.decays(dt)
            ybar = [tl.spread_channels(plan, v) for v in ybar]
            added = [[ybar[m] * C[m][i] for i in rows] for m in modalities]
            if plan.readout == "shared":
                added = self.total(added) * plan.M
            added = [[decays[m][i] * added[m][i] for i in rows] for m in modalities]
            product, rest = self.advance(slot, t, self.total(decays), self.total(added), product, rest)
            product, rest = (tl.reset_state(plan, scr, slot, t, v) for v in (product, rest))
            return product, rest, following

        return fw.walk_steps(here, min(8, self.steps), step, (*carry, load(here - 1)))[:2]
