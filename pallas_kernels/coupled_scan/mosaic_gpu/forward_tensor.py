"""The forward kernel on the tensor cores: `shared`, bfloat16, up to 16 states and 4 modalities (see `pairs`).

As y_m = SUM_n C_mn g_mn a_mn H_n + u_m SUM_n B_mn C_mn, what a thread does for each modality, channel and state is an
exponential, a product with H and a sum into H; the products with B and C are the tensor cores'.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._compat import layout_cast
from pallas_kernels.coupled_scan.mosaic_gpu import forward as fw
from pallas_kernels.coupled_scan.mosaic_gpu import tensor
from pallas_kernels.coupled_scan.mosaic_gpu import tile as tl
from pallas_kernels.coupled_scan.mosaic_gpu.pairs import STAGES, Pair, launch
from pallas_kernels.coupled_scan.mosaic_gpu.plan import F32, Plan
from pallas_kernels.coupled_scan.mosaic_gpu.tile import State


@functools.partial(jax.jit, static_argnames=("plan", "chunk", "save"))
def run(plan: Plan, arrays: dict[str, jax.Array], chunk: int, save: int | None) -> dict[str, jax.Array]:
    """What `forward.run` returns."""
    state = arrays["state"].shape[1:]
    out = {
        "y": jax.ShapeDtypeStruct((plan.M, plan.B, plan.rows, plan.D), plan.dtype),
        "final": jax.ShapeDtypeStruct(state, F32),
    }
    if save:
        out["saved"] = jax.ShapeDtypeStruct((-(-plan.L // save), *state), plan.saved_dtype)
    return launch(plan, "coupled_scan_forward_tensor", _Forward, arrays, out, chunk, -(-plan.L // chunk), save)


class _Forward(Pair):
    """The pair of the forward pass."""

    @staticmethod
    def scratch(plan: Plan, pairs: int, steps: int) -> dict[str, Any]:
        """With what the output takes."""
        result = Pair.scratch(plan, pairs, steps)
        result["C"] = result["B"]
        result["y"] = result["u"]
        result["out"] = jax.ShapeDtypeStruct((pairs, plan.M, steps, plan.threads.channels), plan.dtype)
        if plan.readout == "per_modality":
            result["BC"] = jax.ShapeDtypeStruct((pairs, 2, steps, plan.M), F32)
        if plan.gate:
            result["z"] = result["x"]
        return result

    def finish(self, n: Any, slot: Any) -> None:
        """Gates and stores the output."""
        plan, steps, scr, cut = self.plan, self.steps, self.tile(n), pl.ds(0, self.plan.threads.channels)

        def read(m: int) -> jax.Array:
            y = tl.load_rows(plan, scr["y"].at[:, m, cut], steps)
            if "BC" not in scr:
                return y
            u = tl.load_rows(plan, scr["u"].at[:, m, cut], steps)
            return y + u * tl.over_channels(plan, scr["BC"].at[:, m], steps)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # and for the other warps
        fw.finish_steps(plan, self.inp, scr, self.columns, slot, steps, read)
        tl.commit()
        window = pl.ds(self.start(n), steps)
        plgpu.copy_smem_to_gmem(scr["out"], self.out["y"].at[:, self.b, window, self.columns])

    def scan(self) -> None:
        """The recurrence and what is read of it."""
        plan, b = self.plan, self.b
        constants = tl.Constants(plan, self.inp, 0, self.columns)

        def tile(n: Any, state: State) -> State:
            start = self.start(n)
            if self.save:

                @pl.when(lax.rem(start, self.save) == 0)
                def _() -> None:
                    saved = tl.map_state(lambda v: v.astype(plan.saved_dtype), state)
                    fw.store_state(plan, self.out["saved"].at[start // self.save, :, b, 0, :, :, self.columns], saved)

            return self.scan_tile(n, constants, state)

        state = fw.load_state(plan, self.inp["state"].at[self.c, :, b, 0, :, :, self.columns])
        state = self.each_tile(tile, state)

        @pl.when(self.last)
        def _() -> None:
            fw.store_state(plan, self.out["final"].at[:, b, 0, :, :, self.columns], state)

    def scan_tile(self, n: Any, constants: tl.Constants, state: State) -> State:
        """The steps of tile n.

        Nothing that a step needs or leaves shall be waited for: what it loads is for the steps to come, the products
        u B are for the next one, and it stores what the one before read. The compiler cannot know that these loads
        and stores never meet, and would not move them.
        """
        plan, steps, scr, slot = self.plan, self.steps, self.tile(n), lax.rem(n, STAGES)
        threads, rows, modalities = plan.threads, range(plan.threads.rows), range(plan.M)
        lane = layout_cast(lax.broadcasted_iota(jnp.int32, threads.shape, 0), threads.layout)

        def store_read(t: Any, y: list[jax.Array]) -> None:
            mine = y[0]
            for k, other in enumerate(y[1:], 1):
                mine = jnp.where(lane == k, other, mine)
            tl.store(scr["y"].at[t, :, pl.ds(0, threads.channels)], mine)

        def step(t: Any, carry: tuple) -> tuple:
            state, dt, C, factors, added, y = carry
            following = tl.load_dt(plan, scr, t + 1), self.load_C(scr, t + 1), tl.load_factors(plan, scr, t + 2)
            store_read(jnp.maximum(t - 1, 0), y)
            entering = tl.reset_state(plan, scr, slot, t, state)
            decays = constants.decays(dt)
            passed = [[decays[m][i] * entering[0][i] for i in rows] for m in modalities]
            after = [[added[i] + tl.total([passed[m][i] for m in modalities]) for i in rows]]
            read = after * plan.M if plan.readout == "shared" else passed
            y = [tensor.dot_states(plan, read[m], C[m]) for m in modalities]
            after = tl.hold_state(plan, scr, slot, t, entering, after)
            return after, *following, tensor.outer_products(plan, *factors), y

        here = self.steps_of(n)
        added = tensor.outer_products(plan, *tl.load_factors(plan, scr, 0))
        nothing = [tl.fill(plan, 0.0)] * plan.M
        carry = (state, tl.load_dt(plan, scr, 0), self.load_C(scr, 0), tl.load_factors(plan, scr, 1), added, nothing)
        state, *_, y = fw.walk_steps(here, min(8, steps), step, carry)
        store_read(here - 1, y)
        return state
