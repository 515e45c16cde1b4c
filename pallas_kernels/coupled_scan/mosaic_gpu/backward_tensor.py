"""The backward kernel on the tensor cores: `shared`, bfloat16, gated, up to 16 states and 4 modalities.

It walks as `backward` does (see `stretches`). With l the adjoint of H, dh_m = l + C_m ybar_m and q_m = g_m a_m H:

    l' = SUM_m g_m a_m dh_m        e_m = dh_m q_m        dA_m += e_m dt_m       d(log g_m) += e_m
    ddt_m = SUM_n A_m e_m + du_m x_m                     du_m = SUM_n B_m l + ybar_m SUM_n B_m C_m
    dB_m = SUM_d u_m l + C_m SUM_d u_m ybar_m            dC_m = SUM_d ybar_m q_m + B_m SUM_d u_m ybar_m

(with the shared readout dh is the same for all m, and takes the place of l in du and dB.) What an element costs is an
exponential, 8 multiply-adds, and 3 to find its state again, twice; all other products and sums are the tensor cores'.
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
from pallas_kernels.coupled_scan.mosaic_gpu import blocks, tensor, warp
from pallas_kernels.coupled_scan.mosaic_gpu import forward as fw
from pallas_kernels.coupled_scan.mosaic_gpu import tile as tl
from pallas_kernels.coupled_scan.mosaic_gpu.plan import F32, FACTORS, SLAB, THREADS, Plan, projection_layout
from pallas_kernels.coupled_scan.mosaic_gpu.stretches import Stretches
from pallas_kernels.coupled_scan.mosaic_gpu.sums import Sums, add_pairs, split_pairs
from pallas_kernels.coupled_scan.mosaic_gpu.tile import Refs, State


def _scratch(plan: Plan, steps: int, part: int) -> dict[str, Any]:
    del part
    m, smem, threads = plan.M, jax.ShapeDtypeStruct, plan.threads
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
        "history": smem((steps, threads.rows * threads.vector // 4, THREADS, 4), F32),
        "sums": smem((steps, 4, SLAB, m, 2), F32),
    }
    if plan.readout == "per_modality":
        scratch["dots"] = smem((2, m, steps), F32)
    if plan.flagged:
        scratch["flags"] = smem((blocks.STAGES, steps, plan.flags), F32)
    return scratch


def run(
    plan: Plan, arrays: dict[str, jax.Array], chunk: int, segment: int, in_place: Refs | None = None
) -> dict[str, jax.Array]:
    """What `backward.run` returns."""
    tiling = choose_tiling(plan)
    body = functools.partial(_walk, plan, tiling[0], chunk, segment)
    return bw.launch(plan, "coupled_scan_backward_tensor", body, arrays, _scratch, tiling, chunk, segment, in_place)


def choose_tiling(plan: Plan) -> tuple[int, int]:
    """Twice the steps of a tile."""
    return blocks.choose_tiling(plan, _scratch, ((8, 8), (4, 4)))


def _walk(plan: Plan, steps: int, chunk: int, segment: int, inp: Refs, out: Refs, scr: Refs) -> None:
    if "dots" in scr:
        scr |= {name: scr["dots"].at[k] for k, name in enumerate(("BC", "uy"))}
    order = Stretches(plan, steps, chunk, segment, inp, out, scr)
    b, c, columns = order.b, order.c, order.columns
    block = _Block(plan, steps, b, columns, inp, out, scr)
    constants = tl.Constants(plan, inp, 0, columns)

    # dt_bias comes from device memory: it is loaded for one tile's results and kept for the next tile's beginning.
    def begin(s: Any) -> tuple:
        state = order.saved(s, 0)
        order.note(0, 0, state)
        return state, block.load_parameters("dt_bias")

    def start_walk(item: Any, *, C: bool) -> None:
        tl.convert_projections(plan, inp, scr, lax.rem(item, blocks.STAGES), 0, steps, C=C)
        # The results of the item before have long left its slot, where the next item goes; waits for the other warps.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        order.fetch(item + 1)

    def forwards(k: Any, item: Any, carry: tuple) -> tuple:
        state, bias = carry
        slot = order.await_tile(item, forwards=True)
        fw.prepare_steps(plan, inp, scr, columns, slot, steps, bias)
        start_walk(item, C=False)
        state = block.walk_forwards(slot, constants, state, steps, note=False)
        order.note(k + 1, 0, state)
        tl.sync()
        return state, bias

    def backwards(s: Any, k: Any, item: Any, carry: tuple) -> tuple:
        start = order.start(s, k)
        adjoint, sums, rows, bias = carry
        state, valid = order.entry(k, 0), order.valid(start)  # early: device memory takes its time
        slot = order.await_tile(item, forwards=False)
        block.prepare(slot, bias)
        start_walk(item, C=True)
        block.walk_forwards(slot, constants, state, valid, note=True)
        adjoint, sums = block.walk_backwards(slot, constants, valid, adjoint, sums)
        parameters = {name: block.load_parameters(name) for name in ("dt_bias", "skip") if name in inp}
        tl.sync()
        block.store_projections(order.row + start - order.first)
        rows = block.finish(slot, valid, parameters, rows)
        tl.commit()
        for name in ("x", "dt", "z"):
            target = out[f"d{name}"].at[:, b, pl.ds(start, steps), columns]
            plgpu.copy_smem_to_gmem(scr[name].at[slot], target)
        return adjoint, sums, rows, parameters["dt_bias"]

    order.fetch(0)
    tl.clear_factors(plan, scr, steps)
    sums = Sums(plan, out, 0, columns)
    zero = layout_cast(jnp.zeros((steps, plan.threads.channels), F32), plan.threads.over_steps(steps))
    pairs = [[tl.fill(plan, 0.0)] * (plan.threads.rows // 2) for _ in range(plan.M)]
    adjoints, resumed = inp.get("adjoint", out["dstate"]), "walked" in inp
    adjoint = fw.load_state(plan, adjoints.at[c, :, b, 0], columns=columns)
    rows, bias = [(zero, zero) for _ in range(plan.M)], block.load_parameters("dt_bias")
    carry = (adjoint, sums.zero() | {"dgain": pairs}, rows, bias)
    adjoint, totals, rows, _ = order.walk(begin, forwards, backwards, carry)
    fw.store_state(plan, out["dstate"].at[c, :, b, 0], adjoint, columns)
    sums.store(totals | {"dgain": [split_pairs(plan, values) for values in totals["dgain"]]}, add=resumed)
    bw.store_rows(plan, out["drows"].at[c, b, :, :, :, columns], rows, add=resumed)
    plgpu.wait_smem_to_gmem(0)


class _Block:
    """What a block does with a tile."""

    def __init__(self, plan: Plan, steps: int, b: Any, columns: Any, inp: Refs, out: Refs, scr: Refs):
        self.plan, self.steps, self.b, self.columns = plan, steps, b, columns
        self.inp, self.out, self.scr = inp, out, scr
        self.cut = pl.ds(0, plan.threads.channels)

    def load_parameters(self, name: str) -> list[jax.Array]:
        """dt_bias or the skip, see `tile.load_parameters`."""
        return tl.load_parameters(self.plan, self.inp, name, self.columns, self.steps)

    def prepare(self, slot: Any, bias: list[jax.Array]) -> None:
        """dt, u, the gradient of y before the gate, and the sum over the channels of the product of these two."""
        plan, steps, scr, results = self.plan, self.steps, self.scr, []
        for m in range(plan.M):
            here = fw.present(plan, scr, slot, m, steps)
            x, raw = (tl.keep(here, tl.load_rows(plan, scr[k].at[slot, m], steps)) for k in ("x", "dt"))
            ybar = tl.round_factor(plan, tl.load_ybar(plan, scr, slot, m, steps, here))
            dt = tl.step_size(plan, raw, bias[m], here)
            results.append((dt, tl.round_factor(plan, dt * x), ybar))
        cut = self.cut
        products = [jnp.sum(u * ybar, axis=1) for _, u, ybar in results] if "uy" in scr else []
        for m, (dt, u, ybar) in enumerate(results):
            tl.store(scr["step"].at[:, m, :], dt)
            tl.store(scr["u"].at[:, m, cut], u)
            tl.store(scr["ybar"].at[:, m, cut], ybar)
        for m, product in enumerate(products):
            tl.store(scr["uy"].at[m], product)

    def walk_forwards(self, slot: Any, constants: tl.Constants, state: State, count: Any, *, note: bool) -> State:
        """The state after `count` steps of a tile; `note`: the states entering them are kept."""
        plan, scr = self.plan, self.scr

        def step(t: Any, carry: tuple) -> tuple:
            state, dt, factors, added = carry
            following = tl.load_dt(plan, scr, t + 1), tl.load_factors(plan, scr, t + 2)
            entering = tl.reset_state(plan, scr, slot, t, state)
            if note:
                warp.save_thread(plan, scr["history"].at[t], entering[0])
            decays = constants.decays(dt)
            after = [[tl.total([v, *(d[i] * entering[0][i] for d in decays)]) for i, v in enumerate(added)]]
            after = tl.hold_state(plan, scr, slot, t, entering, after)
            return after, *following, tensor.outer_products(plan, *factors)

        added = tensor.outer_products(plan, *tl.load_factors(plan, scr, 0))
        carry = (state, tl.load_dt(plan, scr, 0), tl.load_factors(plan, scr, 1), added)
        return fw.walk_steps(count, 4, step, carry)[0]

    def finish(self, slot: Any, valid: Any, parameters: dict[str, list[jax.Array]], rows: list) -> list:
        """Puts the results of a tile in place of its inputs; `rows`: running sums for skip and dt_bias."""
        plan, steps, scr, threads, cut = self.plan, self.steps, self.scr, self.plan.threads, self.cut
        index = lax.broadcasted_iota(jnp.int32, (steps, threads.channels), 0)
        lives = layout_cast(index, threads.over_steps(steps)) < valid
        results, new_rows = [], []
        for m in range(plan.M):
            here = fw.present(plan, scr, slot, m, steps)
            flight = [tl.load_rows(plan, scr[k].at[slot, m], steps) for k in ("x", "dt", "dy", "z")]
            x, raw, dy, z = (tl.keep(here, v) for v in flight)
            gate = tl.sigmoid(plan.dtype, z)
            ybar = dy * (z * gate)
            dt = tl.load_rows(plan, scr["step"].at[:, m, :], steps)
            d_exponent, d_u, y = (tl.load_rows(plan, scr[k].at[:, m, cut], steps) for k in ("ybar", "u", "y"))
            if "BC" in scr:
                BC = tl.over_channels(plan, scr["BC"].at[m], steps)
                d_u = d_u + ybar * BC
                y = y + x * dt * BC
            d_dt = d_exponent * bw.LN2 + d_u * x
            if plan.dt_softplus:
                d_dt = d_dt * tl.sigmoid(plan.dtype, raw + parameters["dt_bias"][m])
            d_dt, d_x = tl.keep(here, d_dt), d_u * dt
            if plan.skip:
                d_x = d_x + parameters["skip"][m] * ybar
                y = y + parameters["skip"][m] * x
            d_z = dy * y * (gate + z * gate * (1.0 - gate))
            result = {"x": tl.keep(here, d_x), "dt": d_dt, "z": d_z}
            results.append({name: value.astype(plan.dtype) for name, value in result.items()})
            terms = x * ybar, d_dt
            if not isinstance(valid, int):
                terms = tuple(jnp.where(lives, term, jnp.zeros_like(term)) for term in terms)
            new_rows.append(tuple(a + term for a, term in zip(rows[m], terms, strict=True)))
        for m, result in enumerate(results):
            for name, value in result.items():
                tl.store(scr[name].at[slot, m], value)
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
                uy = lax.broadcast_in_dim(tl.load(scr["uy"].at[m], layout.reduce(1)), B.shape, (0,))
                uy = layout_cast(uy, layout)
                d_B, d_C = d_B + C * uy, d_C + B * uy
            results.append((d_B, d_C))
        for m, values in enumerate(results):
            for k, value in enumerate(values):
                target = self.out["dprojections"].at[group, k, m, self.b, rows, 0]
                tl.store(target, value.astype(plan.dtype))

    def walk_backwards(self, slot: Any, constants: tl.Constants, valid: Any, adjoint: State, sums: dict) -> tuple:
        """The steps of a tile, last first: the adjoint before them, and the sums."""
        plan, scr, threads, cut = self.plan, self.scr, self.plan.threads, self.cut
        rows, modalities, whole = range(threads.rows), range(plan.M), plan.readout == "shared"
        lane = layout_cast(lax.broadcasted_iota(jnp.int32, threads.shape, 0), threads.layout)
        projections = scr["projections"]

        def step(r: Any, carry: tuple) -> tuple:
            adjoint, sums, dt = carry
            t = valid - 1 - r
            following, dt = tl.load_dt(plan, scr, t - 1), [tl.spread_channels(plan, v) for v in dt]
            ybar = [tl.spread_channels(plan, tl.load_channels(plan, scr["ybar"].at[t, m, cut])) for m in modalities]
            before = warp.load_thread(plan, scr["history"].at[t])
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
                of_C.append(tensor.turn(plan, [ybar[m] * v for v in values], pairs=True))
                new = tensor.dot_column(plan, values, C)
                return new if y is None else jnp.where(lane == m, new, y)

            for m in modalities:
                decays = [constants.decay(m, i, dt[m]) for i in rows]
                q = [decays[i] * before[i] for i in rows]
                if whole:
                    after = [a + v for a, v in zip(after, q, strict=True)]
                else:
                    d_h = tensor.add_outer_product(plan, adjoint[0], *ybar_C, m)
                    y = read(m, q, y)
                leaving = [a + decays[i] * d_h[i] for i, a in enumerate(leaving)]
                d_log = [d_h[i] * q[i] for i in rows]
                sums["dA"][m] = [a + d_log[i] * dt[m] for i, a in enumerate(sums["dA"][m])]
                sums["dgain"][m] = add_pairs(plan, sums["dgain"][m], d_log)
                exponents.append(tl.total([d_log[i] * constants.A[m][i] for i in rows]))
            if whole:
                for m in modalities:
                    y = read(m, after, y)
            tensor.sum_turned(plan, of_C, tensor.turn(plan, into_u), scr["u"].at[t, :, cut], scr["sums"].at[t])
            B = tensor.load_columns(plan, projections.at[t, 0])
            stored = {"ybar": tensor.sum_lanes(plan, exponents), "u": tensor.dot_column(plan, into_u, B), "y": y}
            for name, value in stored.items():
                tl.store(scr[name].at[t, :, cut], value)
            adjoint = [leaving]
            if passed is not None:
                adjoint = tl.map_state(jnp.add, adjoint, passed)
            return tl.reset_state(plan, scr, slot, t, adjoint), sums, following

        return fw.walk_steps(valid, 2, step, (adjoint, sums, tl.load_dt(plan, scr, valid - 1)))[:2]
