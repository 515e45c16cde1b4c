"""The forward kernel."""

import functools
from typing import Any

import jax
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._compat import store
from pallas_kernels.causal_conv.mosaic_gpu.block import AT_ONCE, RUN, STEPS, Array, Block, Plan, Refs, launch
from pallas_kernels.coupled_scan.mosaic_gpu import tile as tl


@functools.partial(jax.jit, static_argnames=("plan",))
def run(plan: Plan, arrays: dict[str, Array]) -> Array:
    """y [M B, L, D], from what `mosaic_gpu.prepare` returns."""
    rows = {"x": STEPS + RUN, "y": STEPS}
    out = {"y": jax.ShapeDtypeStruct((plan.M * plan.B, plan.L, plan.D), plan.dtype)}
    return launch(plan, "causal_conv_silu_forward", _work, arrays, out, rows)[0]


def _work(plan: Plan, inp: Refs, out: Refs, scr: Refs) -> None:
    block = Block(plan, inp, scr)

    def walk(n: Any, recent: list) -> list:
        steps, results = [n * AT_ONCE + i for i in range(AT_ONCE)], []
        # Loads come first: the compiler would not move them up past the stores.
        for x in [block.inputs(step) for step in steps]:
            recent = [*recent, x]
            v = block.before_silu(recent)
            results.append(v * tl.sigmoid(plan.dtype, v))
            recent = recent[1:]
        for step, y in zip(steps, results, strict=True):
            store(block.at("y", step), y.astype(plan.dtype))
        return recent

    plgpu.barrier_wait(scr["arrived"])
    lax.fori_loop(0, RUN // AT_ONCE, walk, [block.inputs(i) for i in range(1 - plan.K, 0)])
    tl.commit()
    block.send("y", out["y"], block.first)
    plgpu.wait_smem_to_gmem(0)
