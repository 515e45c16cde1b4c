"""The backward kernel on the tensor cores: `shared`, bfloat16, gated, up to 16 states and 4 modalities.

It walks as `backward` does (see `stretches`). With l the adjoint of H, dh_m = l + C_m ybar_m and q_m = g_m a_m H:

    l' = SUM_m g_m a_m dh_m        e_m = dh_m q_m        dA_m += e_m dt_m       d(log g_m) += e_m
    ddt_m = SUM_n A_m e_m + du_m x_m                     du_m = SUM_n B_m l + ybar_m SUM_n B_m C_m
    dB_m = SUM_d u_m l + C_m SUM_d u_m ybar_m            dC_m = SUM_d ybar_m q_m + B_m SUM_d u_m ybar_m

(with the shared readout dh is the same for all m, and takes the place of l in du and dB.) What an element costs is two
exponentials and ten multiply-adds, finding its state again included; all other products and sums are the tensor cores'.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._compat import layout_cast
from pallas_kernels.coupled_scan.mosaic_gpu import backward as bw
from pallas_kernels.coupled_scan.mosaic_gpu import blocks, channel_sums, tensor, warp
from pallas_kernels.coupled_scan.mosaic_gpu import forward as fw
from pallas_kernels.coupled_scan.mosaic_gpu import tile as tl
from pallas_kernels.coupled_scan.mosaic_gpu.plan import F32, FACTORS, SLAB, THREADS, Plan, projection_layout
from pallas_kernels.coupled_scan.mosaic_gpu.stretches import Stretches
from pallas_kernels.coupled_scan.mosaic_gpu.sums import Sums, load_rows, store_rows
from pallas_kernels.coupled_scan.mosaic_gpu.tile import Refs, State

PART = 4
"""Steps of a tile that are finished at once: the running sums have one row for each."""


def _scratch(plan: Plan, tiling: blocks.Tiling) -> dict[str, Any]:
    m, smem, threads, steps = plan.M, jax.ShapeDtypeStruct, plan.threads, tiling.steps
    large = smem((blocks.STAGES, m, steps, threads.channels), plan.dtype)
    projections = smem((blocks.STAGES, m, steps, 1, SLAB), plan.dtype)
    factors = smem((steps, FACTORS, threads.strip), F32)
    scratch = dict.fromkeys(("x", "dt", "dy", "z"), large) | dict.fromkeys(("B", "C"), projections)
    scratch |= {
        "projections": smem((steps, 2, FACTORS, SLAB), F32),
        "step": smem((steps, m, threads.channels), F32),
        "u": factors,
        "ybar": factors,
        "y": factors,
        "saved": smem((threads.lanes, threads.rows, threads.channels), plan.saved_dtype),
        "notes": smem((plan.save // 2, THREADS, 4), jnp.int32),
        "sums": smem((steps, 4, SLAB, m, 2), F32),
    }
    if plan.flagged:
        scratch["flags"] = smem((blocks.STAGES, steps, plan.flags), F32)
    return scratch


def run(
    plan: Plan, arrays: dict[str, jax.Array], chunk: int, segment: int, in_place: Refs | None = None
) -> dict[str, jax.Array]:
    """What `backward.run` returns."""
    tiling = choose_tiling(plan)
    body = functools.partial(_walk, plan, tiling.steps, chunk, segment)
    saved = arrays["saved"]  # one chain and one slab: copies have few axes
    arrays = arrays | {"saved": saved.reshape(saved.shape[0], plan.B, *saved.shape[-2:])}
    return bw.launch(plan, "coupled_scan_backward_tensor", body, arrays, _scratch, tiling, chunk, segment, in_place)


def choose_tiling(plan: Plan) -> blocks.Tiling:
    """Steps of a tile, and steps that are finished at once."""
    return blocks.choose_tiling(plan, _scratch, ((8, PART), (4, PART)))


def _walk(plan: Plan, steps: int, chunk: int, segment: int, inp: Refs, out: Refs, scr: Refs) -> None:
    if plan.readout == "per_modality":  # they fill up the rows of the factors
        scr |= {name: scr[factor].at[:, :, plan.threads.channels] for name, factor in (("BC", "u"), ("uy", "ybar"))}
    order = Stretches(plan, steps, chunk, segment, inp, out, scr)
    b, c, columns = order.b, order.c, order.columns
    block = _Block(plan, steps, order, inp, out, scr)
    constants = tl.Constants(plan, inp, 0, columns)

    def start_walk(item: Any, *, C: bool) -> None:
        tl.convert_projections(plan, inp, scr, lax.rem(item, blocks.STAGES), 0, steps, C=C)
        # The results of the item before have long left its slot, where the next item goes; waits for the other warps.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        order.fetch(item + 1)

    # dt_bias comes from device memory: it is loaded for one tile's results and kept for the next tile's beginning.
    def begin(_: Any, carry: tuple) -> list:
        plgpu.barrier_wait(scr["entered"])
        return carry[-1]

    def forwards(k: Any, item: Any, bias: list) -> list:
        slot = order.await_tile(item, forwards=True)
        fw.prepare_steps(plan, inp, scr, columns, slot, steps, bias)
        start_walk(item, C=False)
        block.leave(k, block.walk_forwards(slot, constants, block.enter(k), k, steps // 2))
        tl.sync()
        return bias

    def backwards(s: Any, k: Any, item: Any, carry: tuple) -> tuple:
        start = order.start(s, k)
        adjoint, sums, rows, bias = carry
        valid = order.valid(start)
        slot = order.await_tile(item, forwards=False)
        block.prepare(slot, bias)
        start_walk(item, C=True)

        @pl.when(order.is_last(s, k))
        def _() -> None:
            pairs = (valid - 1) // 2
            state = block.walk_forwards(slot, constants, block.enter(k), k, pairs, unroll=1)
            warp.save_rounded(plan, block.pair(k, pairs), tl.reset_state(plan, scr, slot, 2 * pairs, state)[0])

        adjoint, sums = block.walk_backwards(slot, constants, k, valid, adjoint, sums)
        skip = block.load_parameters("skip", PART) if plan.skip else []
        bias = block.load_parameters("dt_bias")
        tl.sync()
        pl.when(k == 0)(lambda: order.fetch_saved(s - 1))
        block.store_projections(order.row + start - order.first)
        for offset in range(0, steps, PART):
            rows = block.finish(slot, offset, valid, skip, rows)
        tl.commit()
        for name in ("x", "dt", "z"):
            target = out[f"d{name}"].at[:, b, pl.ds(start, steps), columns]
            plgpu.copy_smem_to_gmem(scr[name].at[slot], target)
        return adjoint, sums, rows, bias

    order.fetch_saved(order.stretches - 1)
    order.fetch(0)
    tl.clear_factors(plan, scr, steps)
    sums = Sums(plan, out, 0, columns)
    adjoints, resumed = inp.get("adjoint", out["dstate"]), "walked" in inp
    adjoint = fw.load_state(plan, adjoints.at[c, :, b, 0, :, :, columns])
    row_sums, gain_sums = out["drows"].at[c, b, :, :, :, columns], out["dgain_parts"].at[c, b, lax.axis_index("group")]
    start, gains = sums.zero(), [[tl.fill(plan, 0.0)] * 2] * plan.M
    if resumed:
        start, gains = sums.load(), [warp.load_words(plan, gain_sums.at[m]) for m in range(plan.M)]
    rows = load_rows(plan, row_sums, PART, resumed=resumed)
    carry = (adjoint, start | {"dgain": gains}, rows, block.load_parameters("dt_bias"))
    adjoint, totals, rows, _ = order.walk(begin, forwards, backwards, carry)
    fw.store_state(plan, out["dstate"].at[c, :, b, 0, :, :, columns], adjoint)
    sums.store(totals)
    for m, words in enumerate(totals["dgain"]):
        warp.save_words(plan, gain_sums.at[m], words)
    store_rows(row_sums, rows)
    plgpu.wait_smem_to_gmem(0)


class _Block:
    """What a block does with a tile."""

    def __init__(self, plan: Plan, steps: int, order: Stretches, inp: Refs, out: Refs, scr: Refs):
        self.plan, self.steps, self.b, self.columns = plan, steps, order.b, order.columns
        self.inp, self.out, self.scr = inp, out, scr
        self.cut = pl.ds(0, plan.threads.channels)

    def load_parameters(self, name: str, steps: int | None = None) -> list[jax.Array]:
        """dt_bias or the skip for all steps of a tile or some, see `tile.load_parameters`."""
        return tl.load_parameters(self.plan, self.inp, name, self.columns, steps or self.steps)

    def prepare(self, slot: Any, bias: list[jax.Array]) -> None:
        """dt, u, the gradient of y before the gate, and the sum over the channels of the product of these two.

        That gradient also takes the place of dy, and what y is multiplied by to give dz that of z.
        """
        plan, steps, scr, cut, results = self.plan, self.steps, self.scr, self.cut, []
        for m in range(plan.M):
            here = fw.present(plan, scr, slot, m, steps)
            flight = [tl.load_rows(plan, scr[k].at[slot, m], steps) for k in ("x", "dt", "dy", "z")]
            x, raw, dy, z = (tl.keep(here, v) for v in flight)
            gate = tl.sigmoid(plan.dtype, z)
            gated = z * gate
            ybar, slope = dy * gated, dy * (gate + gated * (1.0 - gate))
            dt = tl.step_size(plan, raw, bias[m], here)
            results.append((dt, tl.round_factor(plan, dt * x), ybar, slope))
        products = [jnp.sum(u * ybar, axis=1) for _, u, ybar, _ in results] if "uy" in scr else []
        for m, (dt, u, ybar, slope) in enumerate(results):
            tl.store(scr["step"].at[:, m, :], dt)
            tl.store(scr["u"].at[:, m, cut], u)
            tl.store(scr["ybar"].at[:, m, cut], tl.round_factor(plan, ybar))
            tl.store(scr["dy"].at[slot, m], ybar.astype(plan.dtype))
            tl.store(scr["z"].at[slot, m], slope.astype(plan.dtype))
        for m, product in enumerate(products):
            tl.store(scr["uy"].at[:, m], product)

    def pair(self, k: Any, p: Any) -> Any:
        """Where the state entering pair p of tile k is noted."""
        return self.scr["notes"].at[k * (self.steps // 2) + p]

    def last_pairs(self, k: Any) -> Any:
        """Where the states entering the last two pairs of tile k are noted, and before that the state entering it."""
        return self.scr["notes"].at[pl.ds((k + 1) * (self.steps // 2) - 2, 2)]

    def enter(self, k: Any) -> State:
        """The state entering tile k: the saved one or what `leave` kept."""
        plan, layout = self.plan, self.plan.threads.layout
        left = warp.load_thread(plan, self.last_pairs(k))
        saved = [tl.load(self.scr["saved"].at[:, i], layout).astype(F32) for i in range(plan.threads.rows)]
        return [[tl.choose(k == 0, *values) for values in zip(saved, left, strict=True)]]

    def leave(self, k: Any, state: State) -> None:
        """Keeps the state after tile k for the next one."""
        warp.save_thread(self.plan, self.last_pairs(k + 1), state[0])

    def walk_forwards(
        self, slot: Any, constants: tl.Constants, state: State, k: Any, count: Any, unroll: int = 2
    ) -> State:
        """The state after `count` pairs of steps of tile k; the states entering them are noted."""
        plan, scr = self.plan, self.scr

        def pair(p: Any, carry: tuple) -> tuple:
            return step(2 * p + 1, step(2 * p, carry, p))

        def step(t: Any, carry: tuple, noted: Any = None) -> tuple:
            state, dt, factors, added = carry
            following = tl.load_dt(plan, scr, t + 1), tl.load_factors(plan, scr, t + 2)
            entering = tl.reset_state(plan, scr, slot, t, state)
            if noted is not None:
                warp.save_rounded(plan, self.pair(k, noted), entering[0])
            decays = constants.decays(dt)
            after = [[tl.total([v, *(d[i] * entering[0][i] for d in decays)]) for i, v in enumerate(added)]]
            after = tl.hold_state(plan, scr, slot, t, entering, after)
            return after, *following, tensor.outer_products(plan, *factors)

        added = tensor.outer_products(plan, *tl.load_factors(plan, scr, 0))
        carry = (state, tl.load_dt(plan, scr, 0), tl.load_factors(plan, scr, 1), added)
        return fw.walk_steps(count, unroll, pair, carry)[0]

    def finish(self, slot: Any, offset: int, valid: Any, skip: list[jax.Array], rows: list) -> list:
        """Puts the results of PART steps of a tile in place of its inputs.

        Args:
            slot: of the tile.
            offset: the first of the steps.
            valid: steps of the tile.
            skip: of every modality, if there is one.
            rows: running sums for skip and dt_bias.
        """
        plan, scr, threads, cut = self.plan, self.scr, self.plan.threads, self.cut
        window = pl.ds(offset, PART)
        index = lax.broadcasted_iota(jnp.int32, (PART, threads.channels), 0)
        lives = layout_cast(index, threads.over_steps(PART)) + offset < valid
        results, new_rows = [], []
        for m in range(plan.M):
            here = None
            if plan.masked:
                here = tl.over_channels(plan, scr["flags"].at[slot, window, m], PART)
            x, ybar, slope = (tl.load_rows(plan, scr[k].at[slot, m, window], PART) for k in ("x", "dy", "z"))
            x = tl.keep(here, x)
            dt = tl.load_rows(plan, scr["step"].at[window, m, :], PART)
            d_exponent, d_u, y = (tl.load_rows(plan, scr[k].at[window, m, cut], PART) for k in ("ybar", "u", "y"))
            if "BC" in scr:
                BC = tl.over_channels(plan, scr["BC"].at[window, m], PART)
                d_u = d_u + ybar * BC
                y = y + x * dt * BC
            d_dt = d_exponent * bw.LN2 + d_u * x
            if plan.dt_softplus:
                d_dt = d_dt * tl.softplus_slope(dt)
            d_dt, d_x = tl.keep(here, d_dt), d_u * dt
            if plan.skip:
                d_x = d_x + skip[m] * ybar
                y = y + skip[m] * x
            result = {"x": tl.keep(here, d_x), "dt": d_dt, "z": slope * y}
            results.append({name: value.astype(plan.dtype) for name, value in result.items()})
            terms = x * ybar, d_dt
            if not isinstance(valid, int):
                terms = tuple(jnp.where(lives, term, jnp.zeros_like(term)) for term in terms)
            new_rows.append(tuple(a + term for a, term in zip(rows[m], terms, strict=True)))
        for m, result in enumerate(results):
            for name, value in result.items():
                tl.store(scr[name].at[slot, m, window], value)
        return new_rows

    def store_projections(self, row: Any) -> None:
        """dB and dC of the block's channels: the sums of four warps."""
        plan, steps, scr = self.plan, self.steps, self.scr
        layout, rows, group = projection_layout(steps), pl.ds(row, steps), lax.axis_index("group")
        results = []
        for m in range(plan.M):
            d_C, d_B = (tl.total([tl.load(scr["sums"].at[:, w, :, m, k], layout) for w in range(4)]) for k in range(2))
            if "uy" in scr:
                B, C = (tl.load(scr["projections"].at[:, k, m], layout) for k in range(2))
                uy = lax.broadcast_in_dim(tl.load(scr["uy"].at[:, m], layout.reduce(1)), B.shape, (0,))
                uy = layout_cast(uy, layout)
                d_B, d_C = d_B + C * uy, d_C + B * uy
            results.append((d_B, d_C))
        for m, values in enumerate(results):
            for k, value in enumerate(values):
                target = self.out["dprojections"].at[group, k, m, self.b, rows, 0]
                tl.store(target, value.astype(plan.dtype))

    def walk_backwards(
        self, slot: Any, constants: tl.Constants, k: Any, valid: Any, adjoint: State, sums: dict
    ) -> tuple:
        """The steps of a tile, last first: the adjoint before them, and the sums."""
        plan, scr, threads, cut = self.plan, self.scr, self.plan.threads, self.cut
        rows, modalities, whole = range(threads.rows), range(plan.M), plan.readout == "shared"
        lane = layout_cast(lax.broadcasted_iota(jnp.int32, threads.shape, 0), threads.layout)
        projections = scr["projections"]

        def step(t: Any, adjoint: State, sums: dict, dt: list, before: list, kept: list | None) -> tuple:
            dt = [tl.spread_channels(plan, v) for v in dt]
            ybar = [tl.spread_channels(plan, tl.load_channels(plan, scr["ybar"].at[t, m, cut])) for m in modalities]
            ybar_C = tl.load_factors(plan, scr, t, "ybar", 1)
            passed = None
            if plan.masked:
                idle = scr["flags"][slot, t, plan.M]
                passed = tl.map_state(lambda v: v * idle, adjoint)
                adjoint = tl.map_state(lambda v: v * (1.0 - idle), adjoint)
            after = d_h = None
            if whole:
                after = tensor.outer_products(plan, *tl.load_factors(plan, scr, t))
                d_h = tensor.add_outer_product(plan, adjoint[0], *ybar_C, None)
            C = tensor.load_columns(plan, projections.at[t, 1])
            into_u = d_h if whole else adjoint[0]
            leaving, exponents, of_C, y = [0.0] * len(rows), [], [], None

            def read(m: int, values: list[jax.Array], y: jax.Array | None) -> jax.Array:
                of_C.append(channel_sums.turn(plan, tensor.pack(plan, values, ybar[m])))
                new = tensor.dot_column(plan, values, C)
                return new if y is None else jnp.where(lane == m, new, y)

            for m in modalities:
                decays = kept[m] if kept else [constants.decay(m, i, dt[m]) for i in rows]
                q = [decays[i] * before[i] for i in rows]
                if whole:
                    after = [a + v for a, v in zip(after, q, strict=True)]
                else:
                    d_h = tensor.add_outer_product(plan, adjoint[0], *ybar_C, m)
                    y = read(m, q, y)
                leaving = [a + decays[i] * d_h[i] for i, a in enumerate(leaving)]
                d_log = [d_h[i] * q[i] for i in rows]
                sums["dA"][m] = [a + d_log[i] * dt[m] for i, a in enumerate(sums["dA"][m])]
                sums["dgain"][m] = channel_sums.accumulate(plan, sums["dgain"][m], d_log)
                exponents.append(tl.total([d_log[i] * constants.A[m][i] for i in rows]))
            if whole:
                for m in modalities:
                    y = read(m, after, y)
            packed = tensor.pack(plan, into_u)
            channel_sums.sum_turned(
                plan, of_C, channel_sums.turn(plan, packed), scr["u"].at[t, :, cut], scr["sums"].at[t]
            )
            d_u = tensor.dot_packed(plan, packed, scr["B"].at[slot, :, t, 0])
            tl.store(scr["ybar"].at[t, :, cut], tensor.sum_lanes(plan, exponents))
            tl.store(scr["y"].at[t, :, cut], y)
            tensor.store_modalities(plan, scr["u"].at[t, :, cut], d_u)  # what is not there stays zero
            adjoint = [leaving]
            if passed is not None:
                adjoint = tl.map_state(jnp.add, adjoint, passed)
            return tl.reset_state(plan, scr, slot, t, adjoint), sums

        def ahead(p: Any) -> tuple:
            """What the second step of pair p needs of the first one: dt, decays, the states entering both."""
            t = 2 * p
            dt, words = tl.load_dt(plan, scr, t), warp.load_words(plan, self.pair(k, p))
            entering = [warp.unpack_words(plan, words)]
            decays = constants.decays(dt)
            added = tensor.outer_products(plan, *tl.load_factors(plan, scr, t))
            between = [[tl.total([v, *(d[i] * entering[0][i] for d in decays)]) for i, v in enumerate(added)]]
            between = tl.hold_state(plan, scr, slot, t, entering, between)
            return dt, decays, words, tl.reset_state(plan, scr, slot, t + 1, between)[0]

        def pair(r: Any, carry: tuple) -> tuple:
            adjoint, sums, (dt, decays, words, between) = carry
            p = whole_pairs - 1 - r
            t = 2 * p
            adjoint, sums = step(t + 1, adjoint, sums, tl.load_dt(plan, scr, t + 1), between, None)
            following = ahead(jnp.maximum(p - 1, 0))
            adjoint, sums = step(t, adjoint, sums, dt, warp.unpack_words(plan, words), decays)
            return adjoint, sums, following

        def single(_: Any, carry: tuple) -> tuple:
            """The last step, if their number is odd."""
            before = warp.unpack_words(plan, warp.load_words(plan, self.pair(k, whole_pairs)))
            return step(valid - 1, *carry, tl.load_dt(plan, scr, valid - 1), before, None)

        whole_pairs, last = valid // 2, jnp.maximum(valid // 2 - 1, 0)
        if not isinstance(valid, int):
            adjoint, sums = lax.fori_loop(0, valid % 2, single, (adjoint, sums))
        return lax.fori_loop(0, whole_pairs, pair, (adjoint, sums, ahead(last)))[:2]
