"""The backward kernel."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._compat import layout_cast, load, store
from pallas_kernels.causal_conv.mosaic_gpu.block import (
    AT_ONCE,
    CHANNELS,
    LAYOUT,
    RUN,
    RUNS,
    STEPS,
    Array,
    Block,
    Plan,
    Refs,
    launch,
)
from pallas_kernels.coupled_scan.mosaic_gpu import tile as tl
from pallas_kernels.coupled_scan.mosaic_gpu.plan import F32

BLOCKS = 4096
"""Several tiles a block leave at least so many blocks, about 4 times what an H100 has at once."""


def plan_of(plan: Plan) -> Plan:
    """With several tiles a block, where there are many: fewer sums to write, and each block starts once."""
    tiles = plan.M * plan.B * plan.tiles * plan.groups
    return dataclasses.replace(plan, per_block=max(1, min(8, tiles // BLOCKS)))


@functools.partial(jax.jit, static_argnames=("plan",))
def run(plan: Plan, arrays: dict[str, Array]) -> tuple[Array, Array]:
    """The gradient of x [M B, L, D], and sums for that of the taps, float32 [M chunks, K + 1, D'].

    The arrays: what `mosaic_gpu.prepare` returns, and dy [M B, L, D].
    """
    rows = {"x": STEPS + RUN, "dy": STEPS + RUN, "dx": STEPS}
    sums = (plan.M * plan.chunks, plan.K + 1, plan.groups * CHANNELS)
    out = {
        "dx": jax.ShapeDtypeStruct((plan.M * plan.B, plan.L, plan.D), plan.dtype),
        "sums": jax.ShapeDtypeStruct(sums, F32),
    }
    return launch(plan, "causal_conv_silu_backward", _work, arrays, out, rows)


def _work(plan: Plan, inp: Refs, out: Refs, scr: Refs) -> None:
    block = Block(plan, inp, scr)
    width = plan.K - 1

    def walk(start: Any, count: int, recent: list, gradients: list, sums: list) -> tuple[list, list, list]:
        """Steps start to start + count - 1 of every run, from the last W inputs and, if there are, gradients."""
        # Loads come first: the compiler would not move them up past the stores.
        loaded = [(block.inputs(start + i), load(block.at("dy", start + i), LAYOUT).astype(F32)) for i in range(count)]
        results = []
        for i, (x, dy) in enumerate(loaded):
            recent = [*recent, x]
            v = block.before_silu(recent)
            s = tl.sigmoid(plan.dtype, v)
            # The gradient before SiLU; beyond the sequence's end dy arrives as zeros.
            g = dy * (s * (1.0 + v * (1.0 - s)))
            sums = [total + term for total, term in zip(sums, [*(g * x for x in recent), g], strict=True)]
            recent, gradients = recent[1:], [*gradients, g]
            if len(gradients) == plan.K:
                # Step j gave its input to the taps from the last one on, at steps j, j + 1, ...
                dx = tl.total([w * g for w, g in zip(reversed(block.taps[:-1]), gradients, strict=True)])
                results.append((start + i - width, dx))
                gradients = gradients[1:]
        for i, dx in results:
            store(block.at("dx", i), block.present(i, dx).astype(plan.dtype))
        return recent, gradients, sums

    def one_tile(n: Any, sums: list) -> list:
        tile = block.first + n
        plgpu.barrier_wait(scr["arrived"])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the results of the tile before, and for the other warps
        # A loop, since the compiler would take far more registers for all steps in a row.
        first = -(-width // AT_ONCE) * AT_ONCE
        carry = walk(0, first, [block.inputs(i) for i in range(-width, 0)], [], sums)
        carry = lax.fori_loop(
            0, (RUN - first) // AT_ONCE, lambda n, carry: walk(first + n * AT_ONCE, AT_ONCE, *carry), carry
        )
        walk(RUN, width, *carry)
        tl.commit()
        block.send("dx", out["dx"], tile)
        pl.when(n + 1 < count)(lambda: block.fetch(tile + 1))
        return carry[2]

    count = jnp.minimum(plan.per_block, plan.B * plan.tiles - block.first)
    zero = layout_cast(jnp.zeros((RUNS, CHANNELS), F32), LAYOUT)
    sums = lax.fori_loop(0, count, one_tile, [zero] * (plan.K + 1))
    for k, values in enumerate(sums):
        store(out["sums"].at[block.index, k, block.columns], jnp.sum(values, axis=0))
    plgpu.wait_smem_to_gmem(0)
