"""The forward kernel.

A block walks one chunk of one sample's time for 64 channels, tile by tile. Between two barriers of a tile lies the
scan of all its steps; the other interval gates and stores the tile's output and prepares the next tile's steps.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.coupled_scan.mosaic_gpu import blocks, warp
from pallas_kernels.coupled_scan.mosaic_gpu import tile as tl
from pallas_kernels.coupled_scan.mosaic_gpu.blocks import Tiling
from pallas_kernels.coupled_scan.mosaic_gpu.plan import F32, SLAB, Plan
from pallas_kernels.coupled_scan.mosaic_gpu.tile import Refs, State


def _scratch(plan: Plan, tiling: Tiling) -> dict[str, Any]:
    """What the kernel keeps in shared memory."""
    m, smem, threads, steps = plan.M, jax.ShapeDtypeStruct, plan.threads, tiling.steps
    channels = threads.channels
    large = (blocks.STAGES, m, steps, channels)
    result = {
        "x": smem(large, plan.dtype),
        "dt": smem(large, plan.dtype),
        "B": smem((blocks.STAGES, m, steps, plan.slabs, SLAB), plan.dtype),
        "C": smem((blocks.STAGES, m, steps, plan.slabs, SLAB), plan.dtype),
        "projections": smem((plan.slabs, steps, 2, m, SLAB), F32),
        "step": smem((steps, m, channels), F32),
        "u": smem((steps, m, channels), F32),
        "parts": smem((steps, m, threads.lanes, threads.padded), F32),
        "out": smem((m, steps, channels), plan.dtype),
    }
    if plan.gate:
        result["z"] = smem(large, plan.dtype)
    if plan.flagged:
        result["flags"] = smem((blocks.STAGES, steps, plan.flags), F32)
    if plan.slabs > 1 and not tiling.tight:
        result["carry"] = smem((plan.slabs, plan.S, threads.lanes, threads.rows, channels), F32)
    return result


@functools.partial(jax.jit, static_argnames=("plan", "chunk", "save"))
def run(plan: Plan, arrays: dict[str, jax.Array], chunk: int, save: int | None) -> dict[str, jax.Array]:
    """y, the final state, and the states entering every `save` steps.

    Args:
        plan: the plan.
        arrays: see `vjp.prepare`; "state" holds the states entering the chunks.
        chunk: steps a chunk.
        save: steps between saved states; None: save nothing.

    Returns:
        "y" [M, B, rows, D], "final" [S, B, slabs, SLAB, D'], and "saved" [L / save, S, B, ...] if asked for.
    """
    state = arrays["state"].shape[1:]
    out = {
        "y": jax.ShapeDtypeStruct((plan.M, plan.B, plan.rows, plan.D), plan.dtype),
        "final": jax.ShapeDtypeStruct(state, F32),
    }
    if save:
        out["saved"] = jax.ShapeDtypeStruct((-(-plan.L // save), *state), F32)
    tiling, chunks = choose_tiling(plan), -(-plan.L // chunk)
    if plan.slabs > 1 and tiling.tight:
        out["carry"] = jax.ShapeDtypeStruct((chunks, *state), F32)
    body = functools.partial(_walk, plan, tiling.steps, chunk, save)
    return blocks.launch(plan, "coupled_scan_forward", body, arrays, out, _scratch, tiling, chunks)


def choose_tiling(plan: Plan) -> Tiling:
    """Steps of a tile, all of which are finished at once."""
    return blocks.choose_tiling(plan, _scratch, ((16, 16), (8, 8), (4, 4)))


def present(plan: Plan, scr: Refs, slot: Any, m: int, steps: int) -> jax.Array | None:
    """Where modality m is present, [steps, channels], or None without masks."""
    return tl.over_channels(plan, scr["flags"].at[slot, :, m], steps) if plan.masked else None


def prepare_steps(
    plan: Plan, inp: Refs, scr: Refs, columns: Any, slot: Any, steps: int, bias: list[jax.Array] | None = None
) -> None:
    """dt and u = dt x of a tile; `bias`: if dt_bias is loaded already."""
    bias, out = bias or tl.load_parameters(plan, inp, "dt_bias", columns, steps), []
    for m in range(plan.M):
        here = present(plan, scr, slot, m, steps)
        dt = tl.step_size(plan, tl.load_rows(plan, scr["dt"].at[slot, m], steps), bias[m], here)
        out.append((dt, dt * tl.keep(here, tl.load_rows(plan, scr["x"].at[slot, m], steps))))
    for m, (dt, u) in enumerate(out):
        tl.store(scr["step"].at[:, m, :], dt)
        tl.store(scr["u"].at[:, m, pl.ds(0, plan.threads.channels)], tl.round_factor(plan, u))


def prepare_adjoint(plan: Plan, inp: Refs, scr: Refs, columns: Any, slot: Any, steps: int) -> None:
    """dt of a tile and, in place of u (whose factor is B), the gradient of y before the gate (whose factor is C)."""
    out = []
    for m in range(plan.M):
        here = present(plan, scr, slot, m, steps)
        bias = tl.over_steps(plan, inp["dt_bias"].at[m, columns], steps)
        ybar = tl.load_ybar(plan, scr, slot, m, steps, here)
        out.append((tl.step_size(plan, tl.load_rows(plan, scr["dt"].at[slot, m], steps), bias, here), ybar))
    for m, (dt, ybar) in enumerate(out):
        tl.store(scr["step"].at[:, m, :], dt)
        tl.store(scr["u"].at[:, m, pl.ds(0, plan.threads.channels)], ybar)


def finish_steps(
    plan: Plan, inp: Refs, scr: Refs, columns: Any, slot: Any, steps: int, read: Callable[[int], jax.Array]
) -> None:
    """The output of a tile from what each modality reads, `read(m)` [steps, channels]: skip and gate."""
    results = []
    for m in range(plan.M):
        y, here = read(m), present(plan, scr, slot, m, steps)
        if plan.skip:
            x = tl.keep(here, tl.load_rows(plan, scr["x"].at[slot, m], steps))
            y = y + tl.over_steps(plan, inp["skip"].at[m, columns], steps) * x
        if plan.gate:
            z = tl.load_rows(plan, scr["z"].at[slot, m], steps)
            y = y * tl.silu(plan.dtype, z)
        results.append(tl.keep(here, y).astype(plan.dtype))
    for m, y in enumerate(results):
        tl.store(scr["out"].at[m], y)


def load_step(plan: Plan, scr: Refs, t: Any, *, B: bool = True, C: bool = True) -> list[tuple]:
    """dt and u of one step, before they are spread, and B and C."""

    def projection(k: int, m: int) -> list[jax.Array]:
        return warp.load_projection(plan, scr["projections"].at[t, k, m])

    return [
        (
            tl.load_channels(plan, scr["step"].at[t, m]),
            tl.load_channels(plan, scr["u"].at[t, m]),
            projection(0, m) if B else [],
            projection(1, m) if C else [],
        )
        for m in range(plan.M)
    ]


def spread_step(plan: Plan, now: list[tuple]) -> list[tuple]:
    """What `load_step` returns, all as [lanes, channels]."""
    return [(tl.spread_channels(plan, dt), tl.spread_channels(plan, u), *rest) for dt, u, *rest in now]


def walk_steps(steps: Any, unroll: int, step: Callable, carry: Any) -> Any:
    """carry = step(t, carry) for t in range(steps), `unroll` steps an iteration."""

    def several(i: Any, carry: Any) -> Any:
        for r in range(unroll):
            carry = step(i * unroll + r, carry)
        return carry

    whole = steps // unroll
    carry = lax.fori_loop(0, whole, several, carry)
    if isinstance(steps, int) and steps % unroll == 0:
        return carry
    return lax.fori_loop(whole * unroll, steps, step, carry)


def load_state(plan: Plan, ref: Any) -> State:
    """A reference [S, lanes, rows, channels] -> a state."""
    threads = plan.threads
    return [[tl.load(ref.at[s, :, i], threads.layout) for i in range(threads.rows)] for s in range(plan.S)]


def store_state(plan: Plan, ref: Any, state: State) -> None:
    """The inverse of `load_state`; each thread writes what it would read."""
    for s in range(plan.S):
        for i, values in enumerate(state[s]):
            tl.store(ref.at[s, :, i], values)


def _walk(plan: Plan, steps: int, chunk: int, save: int | None, inp: Refs, out: Refs, scr: Refs) -> None:
    b, c = lax.axis_index("sample"), lax.axis_index("chunk")
    columns, rows = blocks.my_columns(plan), range(plan.threads.rows)
    first = c * chunk
    length = jnp.minimum(chunk, plan.L - first)
    tiles = (length + steps - 1) // steps

    def fetch_tile(n: Any) -> None:
        @pl.when(n < tiles)
        def _() -> None:
            slot = lax.rem(n, blocks.STAGES)
            blocks.fetch(inp, scr, scr["arrived"].at[slot], b, columns, first + n * steps, slot, steps)

    lax.fori_loop(0, blocks.STAGES, lambda n, _: fetch_tile(n), None)

    def of_slab(slab: Any) -> Refs:
        """The shared memory of a slab."""
        return scr | {"projections": scr["projections"].at[slab]}

    def each_slab(function: Callable[[Any], None]) -> None:
        """Runs `function(slab)` for every slab."""
        if plan.slabs == 1:
            function(0)
        else:
            lax.fori_loop(0, plan.slabs, lambda slab, _: function(slab), None)

    def carried(slab: Any) -> Any:
        """Where the state of a slab waits for the next tile."""
        return scr["carry"].at[slab] if "carry" in scr else out["carry"].at[c, :, b, slab, :, :, columns]

    def scan_slab(n: Any, slab: Any, constants: tl.Constants, state: State) -> State:
        slot, here = lax.rem(n, blocks.STAGES), of_slab(slab)
        if save:

            @pl.when(lax.rem(first + n * steps, save) == 0)
            def _() -> None:
                saved = out["saved"].at[(first + n * steps) // save, :, b, slab, :, :, columns]
                store_state(plan, saved, state)

        def step(t: Any, carry: tuple) -> tuple:
            state, loaded = carry
            # The loads of the next step come before the stores of this one: the compiler cannot know that they never
            # meet, and would not move them up.
            following = load_step(plan, here, jnp.minimum(t + 1, steps - 1))
            now = spread_step(plan, loaded)
            entering = tl.reset_state(plan, scr, slot, t, state)
            h, after = tl.advance(plan, constants, entering, now)
            after = tl.hold_state(plan, scr, slot, t, entering, after)
            read = h
            if plan.readout == "shared":
                summed = [tl.total([h[m][i] for m in range(plan.M)]) for i in rows]
                read = [summed] * plan.M
            sums = [tl.total([C * r for C, r in zip(now[m][3], read[m], strict=True)]) for m in range(plan.M)]
            for m in range(plan.M):
                tl.add_slab(plan, scr["parts"].at[t, m, :, pl.ds(0, plan.threads.channels)], sums[m], slab)
            return after, following

        count = steps if plan.L % steps == 0 else jnp.minimum(steps, length - n * steps)
        state, _ = walk_steps(count, min(8, steps), step, (state, load_step(plan, here, 0)))
        return state

    def prepare(n: Any) -> None:
        slot = lax.rem(n, blocks.STAGES)
        plgpu.barrier_wait(scr["arrived"].at[slot])
        prepare_steps(plan, inp, scr, columns, slot, steps)
        each_slab(lambda slab: tl.convert_projections(plan, inp, of_slab(slab), slot, slab, steps))

    def tile(n: Any, state: State) -> State:
        if plan.slabs == 1:
            state = scan_slab(n, 0, constants, state)
        else:

            def one(slab: Any) -> None:
                after = scan_slab(n, slab, tl.Constants(plan, inp, slab, columns), load_state(plan, carried(slab)))
                store_state(plan, carried(slab), after)

            each_slab(one)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # and for the other warps
        finish_steps(
            plan,
            inp,
            scr,
            columns,
            lax.rem(n, blocks.STAGES),
            steps,
            lambda m: tl.load_parts(plan, scr["parts"], m, steps),
        )

        @pl.when(n + 1 < tiles)
        def _() -> None:
            prepare(n + 1)

        tl.commit()
        window = pl.ds(first + n * steps, steps)
        plgpu.copy_smem_to_gmem(scr["out"], out["y"].at[:, b, window, columns])
        fetch_tile(n + blocks.STAGES)
        return state

    if plan.slabs == 1:
        constants = tl.Constants(plan, inp, 0, columns)
        state = load_state(plan, inp["state"].at[c, :, b, 0, :, :, columns])
    else:
        state = []

        def start(slab: Any) -> None:
            store_state(plan, carried(slab), load_state(plan, inp["state"].at[c, :, b, slab, :, :, columns]))

        each_slab(start)
    prepare(0)
    tl.sync()
    state = lax.fori_loop(0, tiles, tile, state)

    @pl.when(c == lax.axis_size("chunk") - 1)
    def _() -> None:
        if plan.slabs == 1:
            store_state(plan, out["final"].at[:, b, 0, :, :, columns], state)
        else:

            def end(slab: Any) -> None:
                store_state(plan, out["final"].at[:, b, slab, :, :, columns], load_state(plan, carried(slab)))

            each_slab(end)

    plgpu.wait_smem_to_gmem(0)
