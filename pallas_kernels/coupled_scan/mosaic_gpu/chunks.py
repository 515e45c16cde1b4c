"""Cutting time: what enters each chunk, from a summary of every chunk and an exact prefix over the summaries.

The state after a chunk is linear in the state entering it: H_end = P H_start + R, where P is the product of the decays
of the chain (for `shared` of SUM_m g^m a^m) and R the end state from zero. The adjoint obeys the same law backwards.
One kernel computes P and R of all chunks at once; it reads x, dt and B (dy, z, dt and C) and writes no sequence.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.coupled_scan.mosaic_gpu import blocks, summary_tensor
from pallas_kernels.coupled_scan.mosaic_gpu import forward as fw
from pallas_kernels.coupled_scan.mosaic_gpu import tile as tl
from pallas_kernels.coupled_scan.mosaic_gpu.plan import F32, SLAB, TENSOR, Plan
from pallas_kernels.coupled_scan.mosaic_gpu.tile import Refs, State

STEPS = 8


def entering(plan: Plan, arrays: dict[str, jax.Array], chunk: int) -> jax.Array:
    """The state entering each chunk, [chunks, S, B, slabs, SLAB, D'], from the initial one in `arrays`."""
    count = -(-plan.L // chunk)
    states = [arrays["state"]]
    if count > 1:
        names = ("x", "dt", "B", "dt_bias", "A", "gain", "flags")
        product, rest = _run(plan, {k: arrays[k] for k in names if k in arrays}, chunk, count - 1, reverse=False)
        for c in range(count - 1):
            states.append(product[c] * states[-1] + rest[c])
    return jnp.stack(states)


def adjoint(plan: Plan, arrays: dict[str, jax.Array], final: jax.Array, chunk: int) -> jax.Array:
    """The gradient of the state leaving each chunk, [chunks, S, B, ...], from that of the final state."""
    count = -(-plan.L // chunk)
    adjoints = [final]
    if count > 1:
        names = ("dt", "z", "dy", "C", "dt_bias", "A", "gain", "flags")
        product, rest = _run(plan, {k: arrays[k] for k in names if k in arrays}, chunk, count - 1, reverse=True)
        for c in reversed(range(count - 1)):
            adjoints.append(product[c] * adjoints[-1] + rest[c])
    return jnp.stack(adjoints[::-1])


def _run(
    plan: Plan, arrays: dict[str, jax.Array], chunk: int, count: int, *, reverse: bool
) -> tuple[jax.Array, jax.Array]:
    """P and R of the first `count` chunks (`reverse`: of all but the first)."""
    if plan.tensor:
        plan = dataclasses.replace(plan, threads=TENSOR)
        result = summary_tensor.run(plan, arrays, chunk, count, reverse=reverse)
        return result["product"], result["rest"]
    m, smem = plan.M, jax.ShapeDtypeStruct
    large = smem((blocks.STAGES, m, STEPS, plan.threads.channels), plan.dtype)
    projection = "C" if reverse else "B"
    scratch = {name: large for name in ("x", "dt", "z", "dy") if name in arrays}
    scratch |= {
        projection: smem((blocks.STAGES, m, STEPS, plan.slabs, SLAB), plan.dtype),
        "projections": smem((STEPS, 2, m, SLAB), F32),
        "step": smem((STEPS, m, plan.threads.channels), F32),
        "u": smem((STEPS, m, plan.threads.channels), F32),
    }
    if plan.flagged:
        scratch["flags"] = smem((blocks.STAGES, STEPS, plan.flags), F32)
    shape = (count, plan.S, plan.B, plan.slabs, SLAB, plan.padded)
    out = {"product": jax.ShapeDtypeStruct(shape, F32), "rest": jax.ShapeDtypeStruct(shape, F32)}
    body = functools.partial(_summarise, plan, chunk, reverse)
    name = "coupled_scan_adjoint_summary" if reverse else "coupled_scan_summary"
    tiling = blocks.choose_tiling(plan, lambda *_: scratch, ((STEPS, STEPS),))
    # Every slab of states is a block of its own: no sum over the states is needed here.
    result = blocks.launch(plan, name, body, arrays, out, lambda *_: scratch, tiling, count * plan.slabs)
    return result["product"], result["rest"]


def _summarise(plan: Plan, chunk: int, reverse: bool, inp: Refs, out: Refs, scr: Refs) -> None:
    b = lax.axis_index("sample")
    c, slab = lax.axis_index("chunk") // plan.slabs, lax.rem(lax.axis_index("chunk"), plan.slabs)
    columns, rows = blocks.my_columns(plan), range(plan.threads.rows)
    first = (c + 1 if reverse else c) * chunk
    length = jnp.minimum(chunk, plan.L - first)
    tiles = (length + STEPS - 1) // STEPS

    def start(n: Any) -> Any:
        return first + (tiles - 1 - n if reverse else n) * STEPS

    def fetch_tile(n: Any) -> None:
        @pl.when(n < tiles)
        def _() -> None:
            slot = lax.rem(n, blocks.STAGES)
            blocks.fetch(inp, scr, scr["arrived"].at[slot], b, columns, start(n), slot, STEPS)

    lax.fori_loop(0, blocks.STAGES, lambda n, _: fetch_tile(n), None)

    def prepare(slot: Any) -> None:
        """dt, and in place of u = dt x (whose factor is B) the gradient of y before the gate (whose factor is C)."""
        if not reverse:
            return fw.prepare_steps(plan, inp, scr, columns, slot, STEPS)
        return fw.prepare_adjoint(plan, inp, scr, columns, slot, STEPS)

    def load_step(t: Any) -> list[tuple]:
        return fw.load_step(plan, scr, t, B=not reverse, C=reverse)

    constants = tl.Constants(plan, inp, slab, columns)

    def scan_tile(n: Any, slot: Any, state: tuple[State, State]) -> tuple[State, State]:
        here = STEPS if plan.L % STEPS == 0 else jnp.minimum(STEPS, first + length - start(n))

        def step(r: Any, carry: tuple) -> tuple:
            product, rest, loaded = carry
            t = here - 1 - r if reverse else r
            following = load_step(jnp.clip(t - 1 if reverse else t + 1, 0, STEPS - 1))
            now = [(dt, u, C if reverse else B) for dt, u, B, C in fw.spread_step(plan, loaded)]
            decays = [[constants.decay(m, i, now[m][0]) for i in rows] for m in range(plan.M)]
            added = [[now[m][1] * now[m][2][i] for i in rows] for m in range(plan.M)]
            if reverse:
                if plan.readout == "shared":
                    added = [[tl.total([added[m][i] for m in range(plan.M)]) for i in rows]] * plan.M
                added = [[decays[m][i] * added[m][i] for i in rows] for m in range(plan.M)]
            if plan.coupling == "shared":
                decays, added = ([[tl.total([v[m][i] for m in range(plan.M)]) for i in rows]] for v in (decays, added))
            if not reverse:
                product, rest = (tl.reset_state(plan, scr, slot, t, v) for v in (product, rest))
            new_product = tl.map_state(jnp.multiply, decays, product)
            new_rest = tl.map_state(lambda a, v, u: a * v + u, decays, rest, added)
            product, rest = (
                tl.hold_state(plan, scr, slot, t, old, new) for old, new in ((product, new_product), (rest, new_rest))
            )
            if reverse:
                product, rest = (tl.reset_state(plan, scr, slot, t, v) for v in (product, rest))
            return product, rest, following

        first_step = load_step(here - 1 if reverse else 0)
        return fw.walk_steps(here, STEPS, step, (*state, first_step))[:2]

    def tile(n: Any, state: tuple[State, State]) -> tuple[State, State]:
        slot = lax.rem(n, blocks.STAGES)
        plgpu.barrier_wait(scr["arrived"].at[slot])
        prepare(slot)
        tl.convert_projections(plan, inp, scr, slot, slab, STEPS)
        tl.sync()
        state = scan_tile(n, slot, state)
        tl.sync()
        fetch_tile(n + blocks.STAGES)
        return state

    initial = tuple([[tl.fill(plan, v)] * len(rows) for _ in range(plan.S)] for v in (1.0, 0.0))
    product, rest = lax.fori_loop(0, tiles, tile, initial)
    fw.store_state(plan, out["product"].at[c, :, b, slab, :, :, columns], product)
    fw.store_state(plan, out["rest"].at[c, :, b, slab, :, :, columns], rest)
