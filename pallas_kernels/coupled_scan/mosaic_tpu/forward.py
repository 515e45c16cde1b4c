"""The forward kernel: one time tile of one block of channels a grid step.

Grid (B, channel blocks, time tiles); the time tiles run in order and hand the state on in VMEM. A grid step
1. prepares the tile: step sizes, dt x, B and C transposed, flags spread over the lanes;
2. walks the tile, a slab of states at a time: eight steps an iteration, the states of the slab in registers;
3. finishes the tile: skip, gate, mask.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.coupled_scan.mosaic_tpu import tile
from pallas_kernels.coupled_scan.mosaic_tpu.plan import LANES, Plan, launch
from pallas_kernels.coupled_scan.mosaic_tpu.tile import Refs, Values

WIDTH = 512
"""Channels a block: B and C are spread over the lanes once for all of them."""


def run(plan: Plan, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Runs the kernel.

    Args:
        plan: the static facts.
        arrays: x, dt, B, C, A and optionally log_gain, weights, D, z, dt_bias, flags, initial_state, as prepared by
            `vjp.prepare`.

    Returns:
        y [M, B, L, D], final_state [S, B, D, N] and, with several tiles, boundaries [tiles - 1, S, B, N, D]: the
        state entering every tile but the first.
    """
    m, chains, time, states = plan.M, plan.chains, plan.tile, plan.states
    width = plan.width(WIDTH)
    k = width // LANES
    blocks = {
        "x": pl.BlockSpec((m, 1, time, width), lambda b, g, i: (0, b, i, g)),
        "B": pl.BlockSpec((m, 1, time, LANES), lambda b, g, i: (0, b, i, 0)),
        "A": pl.BlockSpec((m, states, width), lambda b, g, i: (0, 0, g)),
        "log_gain": pl.BlockSpec((m, states, LANES), lambda b, g, i: (0, 0, 0)),
        "weights": pl.BlockSpec(memory_space=pltpu.SMEM),
        "D": pl.BlockSpec((m, 1, width), lambda b, g, i: (0, 0, g)),
        "initial_state": pl.BlockSpec((chains, 1, width, plan.N), lambda b, g, i: (0, b, g, 0)),
    }
    blocks |= {"dt": blocks["x"], "z": blocks["x"], "C": blocks["B"], "dt_bias": blocks["D"]}
    if plan.flagged:
        rows = arrays["flags"].shape[2]
        blocks["flags"] = pl.BlockSpec((1, 1, rows, time), lambda b, g, i: (b, i, 0, 0))

    x = arrays["x"]
    outputs = {
        "y": (x.shape, x.dtype, blocks["x"]),
        "final_state": ((chains, plan.B, plan.D, plan.N), jnp.float32, blocks["initial_state"]),
    }
    if plan.tiles > 1:
        outputs["boundaries"] = (
            (plan.tiles - 1, chains, plan.B, states, plan.D),
            jnp.float32,
            pl.BlockSpec(
                (1, chains, 1, states, width),
                lambda b, g, i: (jnp.maximum(i - 1, 0), 0, b, 0, g),
            ),
        )
    scratch = {
        "state": (chains, k, states, LANES),
        "B": (m, states, LANES),
        "C": (m, states, LANES),
        "dt": (m, k, time, LANES),
        "u": (m, k, time, LANES),
        "y": (m, k, time, LANES),
        "part": (m, k, plan.steps * 8, LANES),
    }
    if plan.flagged:
        scratch["flags"] = (m + 2, time, LANES)
    return launch(
        _kernel,
        plan,
        "coupled_scan_forward",
        (plan.B, plan.groups(width), plan.tiles),
        ("parallel", "parallel", "arbitrary"),
        {name: (array, blocks[name]) for name, array in arrays.items()},
        outputs,
        scratch,
    )


def _kernel(plan: Plan, inp: Refs, out: Refs, scr: Refs) -> None:
    i = pl.program_id(2)
    width = inp["x"].shape[-1]
    k_range = range(width // LANES)

    @pl.when(i == 0)
    def _() -> None:
        for s in range(plan.chains):
            if "initial_state" in inp:
                for k, values in enumerate(tile.load_state(plan, inp["initial_state"][s, 0])):
                    scr["state"][s, k] = values
            else:
                scr["state"][s] = jnp.zeros_like(scr["state"][s])

    if plan.tiles > 1:

        @pl.when(i > 0)
        def _() -> None:
            for s in range(plan.chains):
                for k in k_range:
                    out["boundaries"][0, s, 0, :, k * LANES : (k + 1) * LANES] = scr["state"][s, k]

    tile.load_flags(plan, inp, scr)
    tile.load_projections(plan, inp, scr)
    jax.lax.fori_loop(0, plan.M, lambda m, _: _prepare(plan, inp, scr, m), None)
    tile.over_slabs(plan, lambda slab: _walk(plan, inp, scr, slab, tile.chunks(plan, i)))
    jax.lax.fori_loop(0, plan.M, lambda m, _: _finish(plan, inp, out, scr, m), None)

    @pl.when(i == plan.tiles - 1)
    def _() -> None:
        for s in range(plan.chains):
            for k in k_range:
                values = scr["state"][s, k].T[:, : plan.N]
                out["final_state"][s, 0, k * LANES : (k + 1) * LANES] = values


def _prepare(plan: Plan, inp: Refs, scr: Refs, m: jax.Array) -> None:
    """Step sizes and dt x of modality m; y = 0."""
    dt = inp["dt"][m, 0].astype(jnp.float32)
    if "dt_bias" in inp:
        dt = dt + inp["dt_bias"][m]
    if plan.dt_softplus:
        dt = tile.softplus(dt)
    x = inp["x"][m, 0].astype(jnp.float32)
    for k, (dt_k, x_k) in enumerate(zip(tile.lane_tiles(dt), tile.lane_tiles(x), strict=True)):
        scr["dt"][m, k] = tile.keep(plan, scr, m, dt_k)
        scr["u"][m, k] = tile.keep(plan, scr, m, dt_k * x_k)
        scr["y"][m, k] = jnp.zeros_like(dt_k)


def _walk(plan: Plan, inp: Refs, scr: Refs, slab: pl.Slice, chunks: jax.Array) -> None:
    """Advances the states of a slab through the tile and adds C h to y."""
    k_range, m_range = range(scr["dt"].shape[1]), range(plan.M)

    def step(t: jax.Array, j: int, state: list[Values], B: Values, C: Values) -> list[Values]:
        def read(m: int, h: Values) -> None:
            column = tile.column(C[m], j)
            for k in k_range:
                scr["part"][m, k, 8 * j : 8 * j + 8] = tile.fold(h[k] * column)

        each = read if plan.readout == "per_modality" else lambda m, h: None
        h, state = tile.advance(plan, inp, scr, slab, t, state, lambda m: tile.column(B[m], j), each)
        if plan.readout == "shared":
            totals = [tile.total(h[k]) for k in k_range]
            for m in m_range:
                read(m, totals)
        return state

    def chunk(c: jax.Array, state: list[Values]) -> list[Values]:
        B = tile.rotate(plan, scr["B"], slab, c)
        C = tile.rotate(plan, scr["C"], slab, c)
        for j in range(plan.steps):
            state = step(plan.steps * c + j, j, state, B, C)
        rows = pl.ds(pl.multiple_of(plan.steps * c, plan.steps), plan.steps)
        for m in m_range:
            for k in k_range:
                scr["y"][m, k, rows] += tile.sum_rows(plan, scr["part"], (m, k))
        return state

    state = [[scr["state"][s, k, slab] for s in range(plan.chains)] for k in k_range]
    state = jax.lax.fori_loop(0, chunks, chunk, state)
    for k in k_range:
        for s in range(plan.chains):
            scr["state"][s, k, slab] = state[k][s]


def _finish(plan: Plan, inp: Refs, out: Refs, scr: Refs, m: jax.Array) -> None:
    """Skip, gate and mask: y of modality m leaves in the dtype of x."""
    for k in range(scr["y"].shape[1]):
        lanes = slice(k * LANES, (k + 1) * LANES)
        y = scr["y"][m, k]
        if "D" in inp:
            y = y + inp["D"][m, :, lanes] * inp["x"][m, 0, :, lanes].astype(jnp.float32)
        if "z" in inp:
            z = inp["z"][m, 0, :, lanes].astype(jnp.float32)
            y = y * (z * jax.nn.sigmoid(z))
        out["y"][m, 0, :, lanes] = tile.keep(plan, scr, m, y).astype(out["y"].dtype)
