"""The backward kernel: the same tiles as the forward one, time in reverse.

With p^m = decay^m hbar^m, where hbar^m = C^m ybar^m + (adjoint arriving from the next step) and ybar is the cotangent
of y times its gate, a step gives

    dA^m += p^m s^m dt,  dlog g^m += p^m s^m,  dW_{m,i} += p^m h_{t-1}^i        (s^m: the mixed entering state)
    dB^m = SUM_d hbar^m u,  dC^m = SUM_d ybar h^m,  du^m = SUM_n hbar^m B^m,  d(dt A)^m = SUM_n p^m s^m A^m

and the adjoint that leaves to the step before: SUM_m p^m (shared), p^m, or W^T p.

Grid (parts of the batch, samples, time tiles in reverse, channel blocks). Each grid step rebuilds the states of the
tile, a slab at a time, from the state entering it, and keeps them in VMEM. The adjoints of all channel blocks wait in
VMEM for the tile before. dB and dC add up over the channel blocks of a tile, the gradients of parameters over a part:
both in VMEM, in a fixed order, so gradients are deterministic.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.coupled_scan.mosaic_tpu import tile
from pallas_kernels.coupled_scan.mosaic_tpu.plan import LANES, LOG2E, Plan, launch
from pallas_kernels.coupled_scan.mosaic_tpu.tile import Refs, Values

WIDTH = 256
"""Channels a block."""


def run(plan: Plan, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Runs the kernel.

    Args:
        plan: the static facts.
        arrays: those of the forward kernel, y_bar, boundaries where there are several tiles, and final_bar
            [S, B, D, N] or nothing for zeros.

    Returns:
        Gradients by argument name. x, dt, z, B, C, initial_state as the arguments are; of the parameters parts that
        are still to be summed: A [P, G, M, N, width], log_gain [P, M, N, 128], weights [P, M * M, 8, 128], D and
        dt_bias [P, G, M, 8, width], for P parts and G channel blocks.
    """
    m, chains, time, states, tiles = plan.M, plan.chains, plan.tile, plan.states, plan.tiles
    width = plan.width(WIDTH)
    k, groups = width // LANES, plan.groups(width)
    samples = plan.B // plan.parts

    def at(*index: str):
        """Index map; its letters: b sample, i time tile, g channel block, e the tile before it, 0 zero."""

        def index_map(p, b, r, g):
            i = tiles - 1 - r
            places = {"b": p * samples + b, "i": i, "g": g, "e": jnp.maximum(i - 1, 0), "p": p, "0": 0}
            # States at the ends of time are of use in one tile only: elsewhere their block stays where it is.
            places["first"] = jnp.where(i == 0, g, 0)
            places["last"] = jnp.where(i == tiles - 1, g, groups - 1)
            return tuple(places[letter] for letter in index)

        return index_map

    state_block = (chains, 1, width, plan.N)
    blocks = {
        "x": pl.BlockSpec((m, 1, time, width), at("0", "b", "i", "g")),
        "B": pl.BlockSpec((m, 1, time, LANES), at("0", "b", "i", "0")),
        "A": pl.BlockSpec((m, states, width), at("0", "0", "g")),
        "log_gain": pl.BlockSpec((m, states, LANES), at("0", "0", "0")),
        "weights": pl.BlockSpec(memory_space=pltpu.SMEM),
        "D": pl.BlockSpec((m, 1, width), at("0", "0", "g")),
        "initial_state": pl.BlockSpec(state_block, at("0", "b", "first", "0")),
        "final_bar": pl.BlockSpec(state_block, at("0", "b", "last", "0")),
        "boundaries": pl.BlockSpec((1, chains, 1, states, width), at("e", "0", "b", "0", "g")),
    }
    blocks |= {"dt": blocks["x"], "z": blocks["x"], "y_bar": blocks["x"]}
    blocks |= {"C": blocks["B"], "dt_bias": blocks["D"]}
    if plan.flagged:
        rows = arrays["flags"].shape[2]
        blocks["flags"] = pl.BlockSpec((1, 1, rows, time), at("b", "i", "0", "0"))

    outputs = {
        name: (arrays[name].shape, arrays[name].dtype, blocks[name])
        for name in ("x", "dt", "z", "B", "C", "initial_state")
        if name in arrays
    }
    parameters = {
        "A": (groups, m, states, width),
        "log_gain": (m, states, LANES),
        "weights": (m * m, 8, LANES),
        "D": (groups, m, 8, width),
        "dt_bias": (groups, m, 8, width),
    }
    for name, shape in parameters.items():
        if name in arrays:
            spec = pl.BlockSpec((1, *shape), at("p", *"0" * len(shape)))
            outputs[name] = ((plan.parts, *shape), jnp.float32, spec)

    rows_of_tile, sums = (m, k, time, LANES), (m, k, plan.steps * 8, LANES)
    scratch = {
        "adjoint": (groups, chains, k, states, LANES),
        "state": (chains, k, states, LANES),
        "history": (time, chains, k, plan.slab, LANES),
        "columns": (time, m, 2, plan.slab, LANES),
        "B": (m, states, LANES),
        "C": (m, states, LANES),
        "dB": (m, states, LANES),
        "dC": (m, states, LANES),
        "dt": rows_of_tile,
        "u": rows_of_tile,
        "y_bar": rows_of_tile,
        "du": rows_of_tile,
        "dexponent": rows_of_tile,
        "part_du": sums,
        "part_dexponent": sums,
    }
    if plan.flagged:
        scratch["flags"] = (m + 2, time, LANES)
    if "z" in arrays:
        scratch |= {"y": rows_of_tile, "part_y": sums}
    return launch(
        _kernel,
        plan,
        "coupled_scan_backward",
        (plan.parts, samples, tiles, groups),
        ("parallel", "arbitrary", "arbitrary", "arbitrary"),
        {name: (array, blocks[name]) for name, array in arrays.items()},
        outputs,
        scratch,
    )


def _kernel(plan: Plan, inp: Refs, out: Refs, scr: Refs) -> None:
    b, g = pl.program_id(1), pl.program_id(3)
    i = plan.tiles - 1 - pl.program_id(2)
    groups = pl.num_programs(3)

    @pl.when((b == 0) & (i == plan.tiles - 1) & (g == 0))
    def _() -> None:
        for name in ("A", "log_gain", "weights", "D", "dt_bias"):
            if name in out:
                out[name][...] = jnp.zeros_like(out[name])

    @pl.when(i == plan.tiles - 1)
    def _() -> None:
        _load_state(plan, inp.get("final_bar"), scr["adjoint"].at[g], g)

    @pl.when(i == 0)
    def _() -> None:
        _load_state(plan, inp.get("initial_state"), scr["state"], g)

    if plan.tiles > 1:

        @pl.when(i > 0)
        def _() -> None:
            for s in range(plan.chains):
                for k, values in enumerate(tile.lane_tiles(inp["boundaries"][0, s, 0])):
                    scr["state"][s, k] = _inside(plan, g, k, values, scr["state"].shape[1])

    @pl.when(g == 0)
    def _() -> None:
        tile.load_flags(plan, inp, scr)
        tile.load_projections(plan, inp, scr)
        scr["dB"][...] = jnp.zeros_like(scr["dB"])
        scr["dC"][...] = jnp.zeros_like(scr["dC"])

    def slab_backwards(slab: pl.Slice) -> None:
        chunks = tile.chunks(plan, i)
        _rebuild(plan, inp, scr, slab, chunks)
        _walk_back(plan, inp, out, scr, slab, chunks, g)

    jax.lax.fori_loop(0, plan.M, lambda m, _: _prepare(plan, inp, scr, m, g), None)
    tile.over_slabs(plan, slab_backwards)
    jax.lax.fori_loop(0, plan.M, lambda m, _: _finish(plan, inp, out, scr, m, g), None)

    @pl.when(g == groups - 1)
    def _() -> None:
        for m in range(plan.M):
            for name in ("B", "C"):
                values = scr["d" + name][m].T[: plan.tile]
                out[name][m, 0, :, : plan.states] = values.astype(out[name].dtype)

    if "initial_state" in out:

        @pl.when(i == 0)
        def _() -> None:
            for s in range(plan.chains):
                for k in range(scr["state"].shape[1]):
                    values = scr["adjoint"][g, s, k].T[:, : plan.N]
                    out["initial_state"][s, 0, k * LANES : (k + 1) * LANES] = values


def _load_state(plan: Plan, source: Any, target: Any, g: jax.Array) -> None:
    """Fills a state [S, K, states, 128] from [S, 1, width, N], or with zeros."""
    if source is None:
        target[...] = jnp.zeros(target.shape, jnp.float32)
        return
    for s in range(plan.chains):
        for k, values in enumerate(tile.load_state(plan, source[s, 0])):
            target[s, k] = _inside(plan, g, k, values, target.shape[1])


def _inside(plan: Plan, g: jax.Array, k: int, values: jax.Array, tiles: int) -> jax.Array:
    """Zeroes lanes beyond channel D: sums over channels must not see what the last block holds there."""
    if plan.D % (tiles * LANES) == 0:
        return values
    lane = jax.lax.broadcasted_iota(jnp.int32, values.shape, values.ndim - 1)
    return jnp.where((g * tiles + k) * LANES + lane < plan.D, values, 0.0)


def _tidy(plan: Plan, scr: Refs, m: jax.Array, g: jax.Array, k: int, values: jax.Array) -> jax.Array:
    """[T, 128] of an input in float32, zero where masked, beyond L and beyond D."""
    values = tile.keep(plan, scr, m, values.astype(jnp.float32))
    return _inside(plan, g, k, values, scr["dt"].shape[1])


def _prepare(plan: Plan, inp: Refs, scr: Refs, m: jax.Array, g: jax.Array) -> None:
    """Step sizes, dt x and the cotangent of y before its gate; sums over states start at zero."""
    for k in range(scr["dt"].shape[1]):
        lanes = slice(k * LANES, (k + 1) * LANES)
        dt = _raw_step_size(inp, m, lanes)
        dt = _tidy(plan, scr, m, g, k, tile.softplus(dt) if plan.dt_softplus else dt)
        y_bar = _tidy(plan, scr, m, g, k, inp["y_bar"][m, 0, :, lanes])
        if "z" in inp:
            z = _tidy(plan, scr, m, g, k, inp["z"][m, 0, :, lanes])
            y_bar = y_bar * (z * jax.nn.sigmoid(z))
            scr["y"][m, k] = jnp.zeros_like(dt)
        scr["dt"][m, k] = dt
        scr["u"][m, k] = dt * _tidy(plan, scr, m, g, k, inp["x"][m, 0, :, lanes])
        scr["y_bar"][m, k] = y_bar
        scr["du"][m, k] = jnp.zeros_like(dt)
        scr["dexponent"][m, k] = jnp.zeros_like(dt)


def _raw_step_size(inp: Refs, m: jax.Array, lanes: slice) -> jax.Array:
    """dt + dt_bias."""
    dt = inp["dt"][m, 0, :, lanes].astype(jnp.float32)
    return dt + inp["dt_bias"][m, :, lanes] if "dt_bias" in inp else dt


def _rebuild(plan: Plan, inp: Refs, scr: Refs, slab: pl.Slice, chunks: jax.Array) -> None:
    """Runs the recurrence of a slab forwards again; keeps the state before every step, and B and C spread over lanes.

    Spreading them here leaves the unit that moves lanes to the sums of dB and dC on the way back.
    """
    k_range = range(scr["dt"].shape[1])

    def step(t: jax.Array, j: int, state: list[Values], B: Values, C: Values) -> list[Values]:
        def column(m: int) -> jax.Array:
            scr["columns"][t, m, 0] = B_m = tile.column(B[m], j)
            scr["columns"][t, m, 1] = tile.column(C[m], j)
            return B_m

        for k in k_range:
            for s in range(plan.chains):
                scr["history"][t, s, k] = state[k][s]
        return tile.advance(plan, inp, scr, slab, t, state, column, lambda m, h: None)[1]

    def chunk(c: jax.Array, state: list[Values]) -> list[Values]:
        B = tile.rotate(plan, scr["B"], slab, c)
        C = tile.rotate(plan, scr["C"], slab, c)
        for j in range(plan.steps):
            state = step(plan.steps * c + j, j, state, B, C)
        return state

    state = [[scr["state"][s, k, slab] for s in range(plan.chains)] for k in k_range]
    jax.lax.fori_loop(0, chunks, chunk, state)


def _walk_back(plan: Plan, inp: Refs, out: Refs, scr: Refs, slab: pl.Slice, chunks: jax.Array, g: jax.Array) -> None:
    """Carries the adjoint of a slab through the tile, last step first, and adds up every gradient."""
    k_range, m_range = range(scr["dt"].shape[1]), range(plan.M)
    weights = inp.get("weights")
    time_lane = jax.lax.broadcasted_iota(jnp.int32, (plan.slab, LANES), 1)

    def visit(t: jax.Array, m: int, k: int, seen: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Modality m at step t: decay, h, the cotangent of y, the cotangent of what is read."""
        a, h = tile.hidden(inp, scr, m, k, slab, t, seen, scr["columns"][t, m, 0])
        y_bar = tile.row(scr["y_bar"], (m, k), t, plan.slab)
        return a, h, y_bar, scr["columns"][t, m, 1] * y_bar

    def chunk(n: jax.Array, adjoint: list[Values]) -> list[Values]:
        c = chunks - 1 - n
        dB = [scr["dB"][m, slab] for m in m_range]
        dC = [scr["dC"][m, slab] for m in m_range]
        sums = _Sums()
        for j in reversed(range(plan.steps)):
            t = plan.steps * c + j
            here = time_lane == t
            before = [[scr["history"][t, s, k] for s in range(plan.chains)] for k in k_range]
            entering = [tile.enter(plan, scr, t, before[k]) for k in k_range]
            seen = [tile.mix(plan, weights, entering[k]) for k in k_range]
            # What arrives from the next step at each modality: nothing where the state passes by.
            arriving = [
                tile.unless_idle(plan, scr, t, adjoint[k], [jnp.zeros_like(a) for a in adjoint[k]]) for k in k_range
            ]
            through = [[] for _ in k_range]

            if plan.readout == "shared":
                read, read_bar = [], []
                for k in k_range:
                    every = [visit(t, m, k, seen[k][m]) for m in m_range]
                    read.append(tile.total([h for _, h, _, _ in every]))
                    read_bar.append(tile.total([h_bar for _, _, _, h_bar in every]))

            rows = slice(8 * j, 8 * j + 8)
            for m in m_range:
                dB_m, dC_m = [], []
                for k in k_range:
                    a, h, y_bar, h_bar = visit(t, m, k, seen[k][m])
                    if plan.readout == "shared":
                        h, h_bar = read[k], read_bar[k]
                    h_bar = h_bar + arriving[k][0 if plan.coupling == "shared" else m]
                    p = a * h_bar
                    through[k].append(p)
                    exponent_bar = p * seen[k][m]
                    A = inp["A"][m, slab, k * LANES : (k + 1) * LANES]
                    scr["part_dexponent"][m, k, rows] = tile.fold(exponent_bar * A)
                    scr["part_du"][m, k, rows] = tile.fold(h_bar * scr["columns"][t, m, 0])
                    if "z" in inp:
                        scr["part_y"][m, k, rows] = tile.fold(h * scr["columns"][t, m, 1])
                    sums.add(("A", m, k), exponent_bar * tile.row(scr["dt"], (m, k), t, plan.slab))
                    sums.add(("log_gain", m), exponent_bar)
                    if plan.coupling == "full":
                        for i in m_range:
                            sums.add(("weights", m, i), tile.fold(p * entering[k][i]))
                    dB_m.append(h_bar * tile.row(scr["u"], (m, k), t, plan.slab))
                    dC_m.append(h * y_bar)
                dB[m] = dB[m] + jnp.where(here, jnp.sum(tile.total(dB_m), axis=1, keepdims=True), 0.0)
                dC[m] = dC[m] + jnp.where(here, jnp.sum(tile.total(dC_m), axis=1, keepdims=True), 0.0)
            leaving = [tile.mix_transposed(plan, weights, through[k]) for k in k_range]
            leaving = [tile.unless_idle(plan, scr, t, leaving[k], adjoint[k]) for k in k_range]
            adjoint = [tile.enter(plan, scr, t, leaving[k]) for k in k_range]

        rows = pl.ds(pl.multiple_of(plan.steps * c, plan.steps), plan.steps)
        for m in m_range:
            scr["dB"][m, slab] = dB[m]
            scr["dC"][m, slab] = dC[m]
            if "log_gain" in out:
                out["log_gain"][0, m, slab] += sums.pop(("log_gain", m))
            if "weights" in out:
                for i in m_range:
                    out["weights"][0, m * plan.M + i] += sums.pop(("weights", m, i))
            for k in k_range:
                out["A"][0, g, m, slab, k * LANES : (k + 1) * LANES] += sums.pop(("A", m, k))
                scr["du"][m, k, rows] += tile.sum_rows(plan, scr["part_du"], (m, k))
                scr["dexponent"][m, k, rows] += tile.sum_rows(plan, scr["part_dexponent"], (m, k))
                if "z" in inp:
                    scr["y"][m, k, rows] += tile.sum_rows(plan, scr["part_y"], (m, k))
        return adjoint

    adjoint = [[scr["adjoint"][g, s, k, slab] for s in range(plan.chains)] for k in k_range]
    adjoint = jax.lax.fori_loop(0, chunks, chunk, adjoint)
    for k in k_range:
        for s in range(plan.chains):
            scr["adjoint"][g, s, k, slab] = adjoint[k][s]


class _Sums(dict):
    """Running sums by key."""

    def add(self, key: tuple, value: jax.Array) -> None:
        self[key] = self[key] + value if key in self else value


def _finish(plan: Plan, inp: Refs, out: Refs, scr: Refs, m: jax.Array, g: jax.Array) -> None:
    """Gradients of x, dt, z, D and dt_bias of modality m from the sums over states."""
    for k in range(scr["dt"].shape[1]):
        lanes = slice(k * LANES, (k + 1) * LANES)
        x = _tidy(plan, scr, m, g, k, inp["x"][m, 0, :, lanes])
        y_bar, du = scr["y_bar"][m, k], scr["du"][m, k]
        dx = scr["dt"][m, k] * du
        # A is scaled by log2(e).
        ddt = scr["dexponent"][m, k] * (1 / LOG2E) + x * du
        if plan.dt_softplus:
            ddt = ddt * jax.nn.sigmoid(_raw_step_size(inp, m, lanes))
        ddt = _tidy(plan, scr, m, g, k, ddt)
        if "D" in inp:
            dx = dx + inp["D"][m, :, lanes] * y_bar
            out["D"][0, g, m, :, lanes] += _fold_rows(x * y_bar)
        if "dt_bias" in inp:
            out["dt_bias"][0, g, m, :, lanes] += _fold_rows(ddt)
        if "z" in inp:
            z = _tidy(plan, scr, m, g, k, inp["z"][m, 0, :, lanes])
            y = scr["y"][m, k] + inp["D"][m, :, lanes] * x if "D" in inp else scr["y"][m, k]
            gate = jax.nn.sigmoid(z)
            dz = _tidy(plan, scr, m, g, k, inp["y_bar"][m, 0, :, lanes]) * y * gate * (1 + z * (1 - gate))
            out["z"][m, 0, :, lanes] = dz.astype(out["z"].dtype)
        out["x"][m, 0, :, lanes] = dx.astype(out["x"].dtype)
        out["dt"][m, 0, :, lanes] = ddt.astype(out["dt"].dtype)


def _fold_rows(values: jax.Array) -> jax.Array:
    """[T, 128] -> [8, 128], to be summed over rows."""
    return jnp.sum(values.reshape(-1, 8, LANES), axis=0)
