"""The backward kernel.

A block walks one chunk of one sample's time for 64 channels, last tile first (see `stretches`). Every tile is walked
forwards once more, noting the state entering each step, and backwards with the adjoint.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._compat import layout_cast
from pallas_kernels.coupled_scan.mosaic_gpu import blocks, channel_sums, warp
from pallas_kernels.coupled_scan.mosaic_gpu import forward as fw
from pallas_kernels.coupled_scan.mosaic_gpu import tile as tl
from pallas_kernels.coupled_scan.mosaic_gpu.blocks import Tiling
from pallas_kernels.coupled_scan.mosaic_gpu.plan import F32, SLAB, THREADS, Plan, projection_layout
from pallas_kernels.coupled_scan.mosaic_gpu.stretches import Stretches
from pallas_kernels.coupled_scan.mosaic_gpu.sums import Sums, load_rows, store_rows
from pallas_kernels.coupled_scan.mosaic_gpu.tile import Refs, State

LN2 = 0.6931471805599453


def _scratch(plan: Plan, tiling: Tiling) -> dict[str, Any]:
    m, smem, threads = plan.M, jax.ShapeDtypeStruct, plan.threads
    (steps, part, tight), channels = tiling, threads.channels
    large = (blocks.STAGES, m, steps, channels)
    projections = smem((blocks.STAGES, m, steps, plan.slabs, SLAB), plan.dtype)
    parts = smem((part, m, threads.lanes, channels if tight else threads.padded), F32)
    scratch = {
        "x": smem(large, plan.dtype),
        "dt": smem(large, plan.dtype),
        "dy": smem(large, plan.dtype),
        "B": projections,
        "C": projections,
        "projections": smem((steps, 2, m, SLAB), F32),
        "step": smem((steps, m, channels), F32),
        "u": smem((steps, m, channels), F32),
        "ybar": smem((steps, m, channels), F32),
        "d_exponent": parts,
        "d_u": parts,
        "sums": smem((part, m, 4, 2, SLAB), F32),
    }
    if plan.gate:
        scratch |= {"z": smem(large, plan.dtype), "y": parts}
    if plan.flagged:
        scratch["flags"] = smem((blocks.STAGES, steps, plan.flags), F32)
    if not tight:
        scratch["history"] = smem((steps, plan.S, threads.rows // 4, THREADS, 4), F32)
    if plan.slabs > 1 and not tight:
        scratch["carry"] = smem((plan.slabs, plan.S, threads.lanes, threads.rows, channels), F32)
    return scratch


def run(
    plan: Plan, arrays: dict[str, jax.Array], chunk: int, segment: int, in_place: Refs | None = None
) -> dict[str, jax.Array]:
    """Gradients.

    Args:
        plan: the plan.
        arrays: see `vjp.prepare`; "saved" as `forward.run` returns it, "adjoint" holds what enters each chunk from
            its end, [chunks, S, B, slabs, SLAB, D'].
        chunk: steps a chunk.
        segment: steps of it that are walked: all, or the last part but `arrays["walked"]`.
        in_place: references to all results but "dprojections", to be written or added to; "dstate" holds the adjoint.

    Returns:
        "dx", "ddt", "dz" [M, B, rows, D]; for each channel group "dprojections" [groups, 2, M, B, L', slabs, SLAB] (B,
        then C; of a segment of every chunk); for each chunk and sample "dA" and "dgain" [chunks, B, M, slabs, SLAB, D']
        (on the tensor cores instead of "dgain" "dgain_parts" [chunks, B, groups, M, THREADS, 4], see
        `channel_sums.sum_states`), "drows" [chunks, B, 2, M, part, D'] (skip and dt_bias) and, for Full, "dweights"
        [chunks, B, M, M, lanes, D'];
        "dstate" [chunks, S, B, slabs, SLAB, D'], the adjoint that leaves a chunk at its start.
    """
    tiling = choose_tiling(plan)
    body = functools.partial(_walk, plan, tiling, chunk, segment)
    return launch(plan, "coupled_scan_backward", body, arrays, _scratch, tiling, chunk, segment, in_place)


def launch(
    plan: Plan,
    name: str,
    body: Callable[[Refs, Refs, Refs], None],
    arrays: dict[str, jax.Array],
    scratch: blocks.Scratch,
    tiling: Tiling,
    chunk: int,
    segment: int,
    in_place: Refs | None,
) -> dict[str, jax.Array]:
    """`blocks.launch` with the results of the backward pass."""
    out, chunks = shapes(plan, chunk, segment, tiling), -(-plan.L // chunk)
    if in_place:
        out = {"dprojections": out["dprojections"]}
    return blocks.launch(plan, name, body, arrays, out, scratch, tiling, chunks, in_place)


def shapes(plan: Plan, chunk: int, segment: int, tiling: Tiling) -> dict[str, Any]:
    """Shapes and dtypes of what `run` returns."""
    (steps, part, tight), chunks, padded = tiling, -(-plan.L // chunk), plan.padded
    state = (plan.S, plan.B, plan.slabs, SLAB, padded)
    rows = min(chunks * segment, -(-plan.L // steps) * steps)
    large = jax.ShapeDtypeStruct((plan.M, plan.B, plan.rows, plan.D), plan.dtype)
    parameters = (chunks, plan.B, plan.M, plan.slabs, SLAB, padded)
    out = {
        "dx": large,
        "ddt": large,
        "dprojections": jax.ShapeDtypeStruct((plan.groups, 2, plan.M, plan.B, rows, plan.slabs, SLAB), plan.dtype),
        "dA": jax.ShapeDtypeStruct(parameters, F32),
        "drows": jax.ShapeDtypeStruct((chunks, plan.B, 2, plan.M, part, padded), F32),
        "dstate": jax.ShapeDtypeStruct((chunks, *state), F32),
    }
    if not plan.threads.tensor:
        out["entries"] = jax.ShapeDtypeStruct((chunks, -(-min(plan.save, plan.L) // steps), *state), F32)
    if tight:
        history = (chunks, plan.B, plan.groups, steps, plan.S, plan.threads.rows // 4, THREADS, 4)
        out["history"] = jax.ShapeDtypeStruct(history, F32)
    if plan.gate:
        out["dz"] = large
    if plan.threads.tensor:
        out["dgain_parts"] = jax.ShapeDtypeStruct((chunks, plan.B, plan.groups, plan.M, THREADS, 4), F32)
    elif plan.coupling == "shared":
        out["dgain"] = jax.ShapeDtypeStruct(parameters, F32)
    if plan.coupling == "full":
        out["dweights"] = jax.ShapeDtypeStruct((chunks, plan.B, plan.M, plan.M, plan.threads.lanes, padded), F32)
    return out


def choose_tiling(plan: Plan) -> Tiling:
    """Steps of a tile, and steps of it whose partial sums are kept at once: all where slabs add to them by turns."""
    return blocks.choose_tiling(plan, _scratch, ((8, 4), (4, 4)) if plan.slabs == 1 else ((8, 8), (4, 4)))


def _walk(plan: Plan, tiling: Tiling, chunk: int, segment: int, inp: Refs, out: Refs, scr: Refs) -> None:
    m_range, (steps, part, tight) = range(plan.M), tiling
    i_range, threads = range(plan.threads.rows), plan.threads
    order = Stretches(plan, steps, chunk, segment, inp, out, scr)
    b, c, columns = order.b, order.c, order.columns
    history = out["history"].at[c, b, lax.axis_index("group")] if tight else scr["history"]

    def adjoint_of(slab: Any) -> Any:
        """Where the adjoint of a slab waits for the next tile."""
        return out["dstate"].at[c, :, b, slab, :, :, columns] if tight else scr["carry"].at[slab]

    def prepare(slot: Any) -> None:
        fw.prepare_steps(plan, inp, scr, columns, slot, steps)
        results = []
        for m in m_range:
            here = fw.present(plan, scr, slot, m, steps)
            results.append(tl.load_ybar(plan, scr, slot, m, steps, here))
        for m, ybar in enumerate(results):
            tl.store(scr["ybar"].at[:, m, :], ybar)

    def per_slab(slot: Any, function: Any, *, C: bool) -> None:
        """Runs `function(slab, constants)` with B and, if asked for, C of the slab at hand."""

        def one(slab: Any, _: None) -> None:
            tl.convert_projections(plan, inp, scr, slot, slab, steps, C=C)
            tl.sync()
            function(slab, tl.Constants(plan, inp, slab, columns))
            tl.sync()

        if plan.slabs == 1:
            function(0, constants)
        else:
            lax.fori_loop(0, plan.slabs, one, None)

    def rebuild(slot: Any, slab: Any, constants: tl.Constants, state: State, count: Any, note: bool) -> State:
        def step(t: Any, carry: tuple) -> tuple:
            state, loaded = carry
            following = fw.load_step(plan, scr, jnp.minimum(t + 1, steps - 1), C=False)
            entering = tl.reset_state(plan, scr, slot, t, state)
            if note:
                for s in range(plan.S):
                    warp.save_thread(plan, history.at[t, s], entering[s])
            after = tl.advance(plan, constants, entering, fw.spread_step(plan, loaded))[1]
            return tl.hold_state(plan, scr, slot, t, entering, after), following

        return fw.walk_steps(count, min(4, steps), step, (state, fw.load_step(plan, scr, 0, C=False)))[0]

    def reverse_step(
        slot: Any, slab: Any, constants: tl.Constants, t: Any, row: Any, adjoint: State, sums: dict
    ) -> tuple:
        """Step t backwards; `adjoint` is the gradient of the state after it."""
        now = fw.spread_step(plan, fw.load_step(plan, scr, t))
        ybar = [tl.spread_channels(plan, tl.load_channels(plan, scr["ybar"].at[t, m])) for m in m_range]
        before = [warp.load_thread(plan, history.at[t, s]) for s in range(plan.S)]
        passed = adjoint
        if plan.masked and plan.coupling != "independent":
            idle = scr["flags"][slot, t, plan.M]
            passed, adjoint = (
                tl.map_state(lambda v: v * idle, adjoint),
                tl.map_state(lambda v: v * (1.0 - idle), adjoint),
            )
        decays = [[constants.decay(m, i, now[m][0]) for i in i_range] for m in m_range]
        entering = [[constants.entering(m, i, before) for i in i_range] for m in m_range]
        h = [[decays[m][i] * entering[m][i] + now[m][1] * now[m][2][i] for i in i_range] for m in m_range]
        read, ybar_C = h, [[ybar[m] * now[m][3][i] for i in i_range] for m in m_range]
        if plan.readout == "shared":
            read = [[tl.total([h[m][i] for m in m_range]) for i in i_range]] * plan.M
            ybar_C = [[tl.total([ybar_C[m][i] for m in m_range]) for i in i_range]] * plan.M
        results, flows = [], []
        for m in m_range:
            dt, u, B, C = now[m]
            chain = adjoint[0 if plan.coupling == "shared" else m]
            d_exponent = d_u = y = None
            products_B, products_C, flow = [], [], []
            for i in i_range:
                d_h = ybar_C[m][i] + chain[i]
                through = decays[m][i] * d_h
                flow.append(through)
                d_log = through * entering[m][i]
                sums["dA"][m][i] = sums["dA"][m][i] + d_log * dt
                if "dgain" in sums:
                    sums["dgain"][m][i] = sums["dgain"][m][i] + d_log
                terms = (d_log * constants.A[m][i], d_h * B[i], read[m][i] * C[i])
                d_exponent, d_u, y = (
                    v if old is None else old + v for old, v in zip((d_exponent, d_u, y), terms, strict=True)
                )
                products_B.append(u * d_h)
                products_C.append(ybar[m] * read[m][i])
            flows.append(flow)
            results.append((d_exponent, d_u, y))
            channel_sums.sum_channels(plan, products_B + products_C, scr["sums"].at[row, m])
        if plan.coupling == "full":
            for m in m_range:
                for j in m_range:
                    pairs = zip(flows[m], before[j], strict=True)
                    sums["dweights"][m][j] = sums["dweights"][m][j] + tl.total([f * v for f, v in pairs])
        if plan.coupling == "shared":
            adjoint = [[tl.total([flows[m][i] for m in m_range]) for i in i_range]]
        elif plan.coupling == "full":
            weights = constants.weights
            adjoint = [[tl.total([weights[m][j] * flows[m][i] for m in m_range]) for i in i_range] for j in m_range]
        else:
            adjoint = flows
        if passed is not None and plan.masked and plan.coupling != "independent":
            adjoint = tl.map_state(jnp.add, adjoint, passed)
        for m, values in enumerate(results):
            for name, value in zip(("d_exponent", "d_u", "y"), values, strict=True):
                if name in scr:
                    tl.add_slab(plan, scr[name].at[row, m, :, pl.ds(0, threads.channels)], value, slab)
        return tl.reset_state(plan, scr, slot, t, adjoint), sums

    def finish(slot: Any, offset: int, valid: Any, rows: list) -> list:
        """Results of `part` steps from `offset` of the tile on, in place of the tile's inputs; `rows`: running sums."""
        window = pl.ds(offset, part)
        index = lax.broadcasted_iota(jnp.int32, (part, threads.channels), 0)
        lives = layout_cast(index, threads.over_steps(part)) + offset < valid
        results, new_rows = [], []
        for m in m_range:
            columns_of = lambda name, m=m: tl.load_rows(plan, scr[name].at[slot, m, window], part)  # noqa: E731
            here = None
            if plan.masked:
                here = tl.over_channels(plan, scr["flags"].at[slot, window, m], part)
            sums = {name: tl.load_parts(plan, scr[name], m, part) for name in ("d_exponent", "d_u", "y") if name in scr}
            x, dy = tl.keep(here, columns_of("x")), tl.keep(here, columns_of("dy"))
            dt, ybar = (tl.load_rows(plan, scr[name].at[window, m], part) for name in ("step", "ybar"))
            d_dt = sums["d_exponent"] * LN2 + sums["d_u"] * x
            if plan.dt_softplus and plan.dtype == jnp.bfloat16:
                d_dt = d_dt * tl.softplus_slope(dt)
            elif plan.dt_softplus:
                raw = tl.keep(here, columns_of("dt")) + tl.over_steps(plan, inp["dt_bias"].at[m, columns], part)
                d_dt = d_dt * tl.sigmoid(plan.dtype, raw)
            d_dt = tl.keep(here, d_dt)
            d_x = sums["d_u"] * dt
            if plan.skip:
                d_x = d_x + tl.over_steps(plan, inp["skip"].at[m, columns], part) * ybar
            result = {"dx": tl.keep(here, d_x), "ddt": d_dt}
            if plan.gate:
                z = tl.keep(here, columns_of("z"))
                y = sums["y"]
                if plan.skip:
                    y = y + tl.over_steps(plan, inp["skip"].at[m, columns], part) * x
                s = tl.sigmoid(plan.dtype, z)
                result["dz"] = dy * y * (s + z * s * (1.0 - s))
            results.append({name: value.astype(plan.dtype) for name, value in result.items()})
            zero = jnp.zeros_like(d_dt)
            new_rows.append((rows[m][0] + jnp.where(lives, x * ybar, zero), rows[m][1] + jnp.where(lives, d_dt, zero)))
        for m, result in enumerate(results):
            for name, target in (("dx", "x"), ("ddt", "dt"), ("dz", "z")):
                if name in result:
                    tl.store(scr[target].at[slot, m, window], result[name])
        return new_rows

    def write_projections(start: Any, offset: int, slab: Any) -> None:
        """dB and dC of the block's channels: the sums of its four warps."""
        rows = pl.ds(order.row + start - order.first + offset, part)
        for m in m_range:
            for k in range(2):
                pieces = [tl.load(scr["sums"].at[:, m, w, k], projection_layout(part)) for w in range(4)]
                target = out["dprojections"].at[lax.axis_index("group"), k, m, b, rows, slab]
                tl.store(target, tl.total(pieces).astype(plan.dtype))

    def begin(s: Any, _: tuple) -> list:
        lax.fori_loop(0, plan.slabs, lambda slab, _: order.note(0, slab, order.saved(s, slab)), None)
        return []

    def forward_item(k: Any, item: Any, nothing: list) -> list:
        loaded = order.entry(k, 0) if plan.slabs == 1 else None  # early: device memory takes its time
        slot = order.await_tile(item, forwards=True)
        fw.prepare_steps(plan, inp, scr, columns, slot, steps)
        if plan.slabs == 1:
            tl.convert_projections(plan, inp, scr, slot, 0, steps, C=False)
        tl.sync()

        def walk(slab: Any, constants: tl.Constants) -> None:
            state = rebuild(slot, slab, constants, loaded or order.entry(k, slab), steps, note=False)
            order.note(k + 1, slab, state)

        per_slab(slot, walk, C=False)
        tl.sync()
        order.fetch(item + blocks.STAGES)
        return nothing

    def backward_item(s: Any, k: Any, item: Any, carry: tuple) -> tuple:
        start = order.start(s, k)
        loaded = order.entry(k, 0) if plan.slabs == 1 else None  # early: device memory takes its time
        valid = order.valid(start)
        slot = order.await_tile(item, forwards=False)
        prepare(slot)
        if plan.slabs == 1:
            tl.convert_projections(plan, inp, scr, slot, 0, steps)
        tl.sync()

        def walk(slab: Any, constants: tl.Constants, offset: int, adjoint: State, sums: dict) -> tuple:
            if offset == steps - part:
                rebuild(slot, slab, constants, loaded or order.entry(k, slab), valid, note=True)

            def step(r: Any, carry: tuple) -> tuple:
                row = count - 1 - r
                return reverse_step(slot, slab, constants, offset + row, row, *carry)

            count = part if isinstance(valid, int) else jnp.clip(valid - offset, 0, part)
            return fw.walk_steps(count, 1, step, (adjoint, sums))

        adjoint, sums, rows = carry
        for offset in reversed(range(0, steps, part)):
            if plan.slabs == 1:
                adjoint, sums = walk(0, constants, offset, adjoint, sums)
                tl.sync()
                write_projections(start, offset, 0)
            else:

                def one(slab: Any, constants: tl.Constants, offset: int = offset) -> None:
                    adjoint = fw.load_state(plan, adjoint_of(slab))
                    stored = Sums(plan, out, slab, columns)
                    adjoint, sums = walk(slab, constants, offset, adjoint, stored.load())
                    fw.store_state(plan, adjoint_of(slab), adjoint)
                    stored.store(sums)
                    tl.sync()
                    write_projections(start, offset, slab)

                per_slab(slot, one, C=True)
            rows = finish(slot, offset, valid, rows)
            (tl.sync if offset else tl.commit)()
        for name, source in (("dx", "x"), ("ddt", "dt"), ("dz", "z")):
            if name in out:
                target = out[name].at[:, b, pl.ds(start, steps), columns]
                plgpu.copy_smem_to_gmem(scr[source].at[slot], target)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        order.fetch(item + blocks.STAGES)
        return adjoint, sums, rows

    constants = None
    adjoints, resumed = inp.get("adjoint", out["dstate"]), "walked" in inp
    row_sums = out["drows"].at[c, b, :, :, :, columns]
    rows = load_rows(plan, row_sums, part, resumed=resumed)
    if plan.slabs == 1:
        constants = tl.Constants(plan, inp, 0, columns)
        sums = Sums(plan, out, 0, columns)
        adjoint = fw.load_state(plan, adjoints.at[c, :, b, 0, :, :, columns])
        carry = (adjoint, sums.load() if resumed else sums.zero(), rows)
    else:

        def start_slab(slab: Any, _: None) -> None:
            adjoint = fw.load_state(plan, adjoints.at[c, :, b, slab, :, :, columns])
            fw.store_state(plan, adjoint_of(slab), adjoint)
            if not resumed:
                sums = Sums(plan, out, slab, columns)
                sums.store(sums.zero())

        lax.fori_loop(0, plan.slabs, start_slab, None)
        carry = ([], {}, rows)
    lax.fori_loop(0, blocks.STAGES, lambda item, _: order.fetch(item), None)
    adjoint, totals, rows = order.walk(begin, forward_item, backward_item, carry)
    if plan.slabs == 1:
        fw.store_state(plan, out["dstate"].at[c, :, b, 0, :, :, columns], adjoint)
        sums.store(totals)
    else:

        def end_slab(slab: Any, _: None) -> None:
            adjoint = fw.load_state(plan, adjoint_of(slab))
            fw.store_state(plan, out["dstate"].at[c, :, b, slab, :, :, columns], adjoint)

        lax.fori_loop(0, plan.slabs, end_slab, None)
    store_rows(row_sums, rows)
    plgpu.wait_smem_to_gmem(0)
