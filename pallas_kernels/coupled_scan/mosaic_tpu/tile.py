"""What the forward and the backward kernel do alike with a time tile in VMEM.

Axes: M modality, T step of the tile, N state, S chain; K counts the registers of 128 channels in a block. A state is a
list over chains of [slab, 128] values; what belongs to modalities is a list over m. Scratch buffers are float32:

    flags     [rows, T, 128]     the flags of each step, the same on all lanes
    B, C      [M, N, 128]        the tile transposed: time on lanes
    dt, u     [M, K, T, 128]     step size and dt x
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.coupled_scan.mosaic_tpu.plan import LANES, Plan

Refs = dict[str, Any]
Values = list[jax.Array]


def lane_tiles(values: jax.Array) -> Values:
    """Cuts [..., K * 128] into K values of 128 lanes."""
    return [values[..., k : k + LANES] for k in range(0, values.shape[-1], LANES)]


def load_flags(plan: Plan, inp: Refs, scr: Refs) -> None:
    """Spreads the flags of the tile over the lanes."""
    if plan.flagged:
        columns = inp["flags"][0, 0].T  # [T, rows]
        for row in range(plan.M + 2):
            scr["flags"][row] = jnp.broadcast_to(columns[:, row : row + 1], (plan.tile, LANES))


def load_projections(plan: Plan, inp: Refs, scr: Refs) -> None:
    """Transposes the tile of B and C; states beyond N and steps that are masked or beyond L become zero."""
    for m in range(plan.M):
        for name in ("B", "C"):
            values = inp[name][m, 0].astype(jnp.float32).T[: plan.states]
            if plan.states != plan.N:
                state = jax.lax.broadcasted_iota(jnp.int32, values.shape, 0)
                values = jnp.where(state < plan.N, values, 0.0)
            if plan.flagged:
                values = jnp.where(inp["flags"][0, 0, m : m + 1] > 0, values, 0.0)
            scr[name][m, :, : plan.tile] = values


def keep(plan: Plan, scr: Refs, m: jax.Array, values: jax.Array) -> jax.Array:
    """Zeroes rows of [T, 128] that are masked or beyond L, whatever they hold."""
    return jnp.where(scr["flags"][m] > 0, values, 0.0) if plan.flagged else values


def softplus(values: jax.Array) -> jax.Array:
    """log(1 + exp(v)) without overflow."""
    return jnp.maximum(values, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(values)))


def load_state(plan: Plan, values: jax.Array) -> Values:
    """[128 * K, N] as stored -> K values [states, 128] as computed with."""
    return [pad_rows(block.T, plan.states) for block in jnp.split(values, values.shape[0] // LANES)]


def pad_rows(values: jax.Array, rows: int) -> jax.Array:
    """Zero rows below, up to `rows`."""
    missing = rows - values.shape[0]
    return jnp.concatenate([values, jnp.zeros((missing, values.shape[1]), values.dtype)]) if missing else values


def row(ref: Any, index: tuple, t: jax.Array, rows: int) -> jax.Array:
    """Row t of a [T, 128] buffer on `rows` sublanes; the load itself spreads it."""
    return jnp.broadcast_to(ref[(*index, pl.ds(t, 1))], (rows, LANES))


def rotate(plan: Plan, ref: Any, slab: Any, chunk: jax.Array) -> Values:
    """B or C of a slab, [slab, 128] for each modality, with the steps of a chunk rotated to the first lanes."""
    shift = (LANES - plan.steps * chunk) % LANES
    return [pltpu.roll(ref[m, slab], shift, 1) for m in range(plan.M)]


def column(values: jax.Array, j: int) -> jax.Array:
    """Lane j on all lanes."""
    return jnp.broadcast_to(values[:, j : j + 1], values.shape)


def enter(plan: Plan, scr: Refs, t: jax.Array, state: Values) -> Values:
    """The state entering step t: zero at a reset."""
    if not plan.resets:
        return state
    stop = row(scr["flags"], (plan.M + 1,), t, plan.slab) > 0
    return [jnp.where(stop, 0.0, s) for s in state]


def unless_idle(plan: Plan, scr: Refs, t: jax.Array, values: Values, idle: Values) -> Values:
    """`values`, or `idle` where nothing is observed at step t."""
    if not plan.idles:
        return values
    stop = row(scr["flags"], (plan.M,), t, plan.slab) > 0
    return [jnp.where(stop, i, v) for v, i in zip(values, idle, strict=True)]


def mix(plan: Plan, weights: Any, state: Values) -> Values:
    """What each modality reads of the entering state, without the gain (which is part of the decay)."""
    if plan.coupling == "shared":
        return state * plan.M
    if plan.coupling == "independent":
        return state
    return [_weighted([weights[m, i] for i in range(plan.M)], state) for m in range(plan.M)]


def mix_transposed(plan: Plan, weights: Any, adjoint: Values) -> Values:
    """Adjoint of `mix`."""
    if plan.coupling == "shared":
        return [total(adjoint)]
    if plan.coupling == "independent":
        return adjoint
    return [_weighted([weights[m, i] for m in range(plan.M)], adjoint) for i in range(plan.M)]


def collect(plan: Plan, hidden: Values) -> Values:
    """The state carried on: the sum over modalities for `shared`."""
    return [total(hidden)] if plan.coupling == "shared" else hidden


def total(values: Values) -> jax.Array:
    """Sum of a list."""
    return sum(values[1:], start=values[0])


def _weighted(weights: list, values: Values) -> jax.Array:
    return total([w * v for w, v in zip(weights, values, strict=True)])


def advance(
    plan: Plan,
    inp: Refs,
    scr: Refs,
    slab: Any,
    t: jax.Array,
    state: list[Values],
    B: Callable[[int], jax.Array],
    visit: Callable[[int, Values], None],
) -> tuple[list[Values], list[Values]]:
    """Advances a slab by step t; lists over k come first.

    Modalities come one after the other, all registers of one together, so that few columns are alive at a time.

    Args:
        plan: the static facts.
        inp: refs of the inputs.
        scr: refs of the scratch buffers.
        slab: rows of the slab.
        t: the step.
        state: [k][s], each [slab, 128].
        B: gives the column of a modality.
        visit: called with each modality and its h, [k].

    Returns:
        h, [k][m], and the state after the step.
    """
    k_range = range(len(state))
    entering = [enter(plan, scr, t, state[k]) for k in k_range]
    seen = [mix(plan, inp.get("weights"), entering[k]) for k in k_range]
    h = [[] for _ in k_range]
    for m in range(plan.M):
        column_m = B(m)
        for k in k_range:
            h[k].append(hidden(inp, scr, m, k, slab, t, seen[k][m], column_m)[1])
        visit(m, [h[k][m] for k in k_range])
    return h, [unless_idle(plan, scr, t, collect(plan, h[k]), entering[k]) for k in k_range]


def hidden(inp: Refs, scr: Refs, m: int, k: int, slab: Any, t: jax.Array, seen: jax.Array, B: jax.Array) -> Values:
    """One modality after step t, [decay, h]; seen: what it reads of the entering state; B: its column."""
    dt, u = (row(scr[name], (m, k), t, seen.shape[0]) for name in ("dt", "u"))
    a = decay(inp, m, k, slab, dt)
    return [a, a * seen + u * B]


def decay(inp: Refs, m: int, k: int, slab: Any, dt: jax.Array) -> jax.Array:
    """g exp(dt A) as one power of two: A and log g come scaled by log2(e)."""
    exponent = dt * inp["A"][m, slab, k * LANES : (k + 1) * LANES]
    if "log_gain" in inp:
        exponent = exponent + inp["log_gain"][m, slab]
    return jnp.exp2(exponent)


def fold(values: jax.Array) -> jax.Array:
    """Adds up the registers of [slab, 128]: [8, 128], which still has to be summed over its rows."""
    return total([values[r : r + 8] for r in range(0, values.shape[0], 8)])


def sum_rows(plan: Plan, ref: Any, index: tuple) -> jax.Array:
    """[steps * 8, 128] -> [steps, 128]: strided loads transpose through memory, so that whole registers are added."""
    return total([ref.at[index][pl.ds(r, plan.steps, stride=8)] for r in range(8)])


def over_slabs(plan: Plan, body: Callable[[Any], None]) -> None:
    """Calls `body` with the rows of each slab of states."""

    def step(index: jax.Array, _: None) -> None:
        body(pl.ds(pl.multiple_of(index * plan.slab, plan.slab), plan.slab))

    jax.lax.fori_loop(0, plan.states // plan.slab, step, None)


def chunks(plan: Plan, tile_index: jax.Array) -> jax.Array:
    """Chunks of `plan.steps` steps of this time tile that hold a step before L."""
    return (jnp.minimum(plan.L - tile_index * plan.tile, plan.tile) + plan.steps - 1) // plan.steps
