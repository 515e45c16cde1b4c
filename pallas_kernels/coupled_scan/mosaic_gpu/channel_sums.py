"""Sums over channels on the tensor cores, whose instruction adds up over the states as they lie (see `mma`).

Axes: M modality, N state, D channel; arrays [lanes, channels] lie over the threads as `plan.Threads` says.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.coupled_scan.mosaic_gpu import mma, warp
from pallas_kernels.coupled_scan.mosaic_gpu.plan import F32, Plan

Array = jax.Array


def sum_channels(plan: Plan, products: list[Array], ref: Any) -> None:
    """Sums 2 * rows arrays [lanes, channels] over the channels of each warp, into a reference [4, 2, SLAB].

    The tensor cores do most of it: a product of a matrix with ones adds four lanes, for four arrays in one
    instruction; by shuffles alone it would take 7.5 instructions for each array. With float32 inputs a second pass
    adds what they cut off (13 of 24 bits).

    Args:
        plan: the plan, whose `threads` are the default ones.
        products: the arrays.
        ref: where the sums go; axis 0 counts the warps.
    """
    threads, exact = plan.threads, plan.dtype != jnp.bfloat16
    if plan.interpret:
        stacked = jnp.stack(products).reshape(2, threads.rows, threads.lanes, 4, threads.channels // 4)
        ref[...] = jnp.transpose(jnp.sum(stacked, axis=4), (3, 0, 2, 1)).reshape(4, 2, -1)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *[threads.layout] * len(products)))
    def sums(ctx: Any, target: Any, *arrays: Any) -> None:
        del ctx
        _sum_over_lanes(target, [warp.values(a)[0] for a in arrays], exact)

    sums(ref.reshape(4, 2, threads.lanes, threads.rows), *products)


def _sum_over_lanes(target: Any, products: list[Any], exact: bool) -> None:
    ir, arith, _, _ = warp.dialects()
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    lane, own_warp = mma.lane(), mma.own_warp()
    within = mma.within_four()
    acc = None
    for quarter in range(4):
        values = products[4 * quarter : 4 * quarter + 4]
        # Lane l holds row l // 4, column l % 4 (and + 8, + 4) of A. B sends the sum of columns 0 to 3 to column
        # 2 quarter of the result and that of 4 to 7 to the next; lane l receives columns 2 (l % 4) and the next.
        ones = [mma.ones(0x3F800000, 2 * quarter + k) for k in range(2)]
        parts = [values]
        if exact:
            high = [arith.bitcast(f32, arith.andi(arith.bitcast(i32, v), warp.constant(-8192))) for v in values]
            parts = [high, [arith.subf(v, h) for v, h in zip(values, high, strict=True)]]
        for part in parts:
            acc = mma.mma([part[k] for k in (0, 2, 1, 3)], ones, acc)
    # Lane l has arrays 4 (l % 4) to 4 (l % 4) + 3, summed over the lanes of l // 4: add the other groups of its warp.
    for distance in (4, 8):
        acc = [arith.addf(v, mgpu.utils.shfl_bfly(v, distance)) for v in acc]
    shared = arith.shrui(lane, warp.constant(4))
    first_row = arith.muli(arith.andi(within, warp.constant(1)), warp.constant(4))
    warp.store_vector(target, [own_warp, arith.shrui(within, warp.constant(1)), shared, first_row], acc)


def turn(plan: Plan, packed: list[Array]) -> list[Array]:
    """What `sum_turned` takes: what `pack` returns with the channels where the states were."""
    threads = plan.threads
    if plan.interpret:
        return packed
    like = plgpu.ShapeDtypeStruct(threads.shape, F32, layout=threads.layout)

    @plgpu.inline_mgpu(arg_types=[threads.layout] * len(packed), return_type=[like] * len(packed))
    def transposed(ctx: Any, *arrays: Any) -> Any:
        del ctx
        ir, arith, llvm, _ = warp.dialects()
        i32, code = ir.IntegerType.get_signless(32), "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;"

        def moved(word: Any) -> Any:
            return llvm.inline_asm(i32, [arith.bitcast(i32, word)], code, "=r,r", has_side_effects=False)

        return [warp.array(threads, [moved(word) for word in warp.values(v)]) for v in arrays]

    return list(transposed(*packed))


def sum_turned(plan: Plan, by_modality: list[list[Array]], shared: list[Array], u: Any, ref: Any) -> None:
    """Sums over the channels of each warp, of `by_modality` and of u_m times `shared`.

    Args:
        plan: the plan, whose threads are `TENSOR`.
        by_modality: for each modality what `turn` makes of what was packed with a factor.
        shared: what it makes of what was packed without.
        u: a reference [4, channels].
        ref: where the sums go, [4, SLAB, M, 2]; axis 0 counts the warps.
    """
    threads = plan.threads
    if plan.interpret:

        def states(rows: list[Array]) -> Array:
            return jnp.stack(rows, axis=1).reshape(-1, 4, threads.channels // 4)

        own = jnp.stack([jnp.sum(states(rows), axis=2) for rows in by_modality])
        others = jnp.einsum("nwc,mwc->mnw", states(shared), u[...].reshape(4, 4, -1)[: plan.M])
        ref[...] = jnp.transpose(jnp.stack([own, others]), (3, 2, 1, 0))
        return

    flat = [v for arrays in (*by_modality, shared) for v in arrays]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), *[threads.layout] * len(flat)))
    def sums(ctx: Any, target: Any, u: Any, *arrays: Any) -> None:
        del ctx
        _, arith, _, _ = warp.dialects()
        *own, first, second = [warp.values(v) for v in arrays]
        d = None
        for m, words in enumerate(own):
            d = mma.mma(words, [mma.ones(0x3F803F80, 2 * m)], d, "bf16")
        # Column 2 m + 1 is for u_m: its rows are the channels 2 k of a warp, then 2 k + 1, as those of `shared`.
        column, warp_index = arith.shrui(mma.lane(), warp.constant(2)), mma.own_warp()
        channel = arith.addi(arith.muli(warp_index, warp.constant(16)), arith.muli(mma.within_four(), warp.constant(4)))
        values = warp.load_vector(u, [arith.shrui(column, warp.constant(1)), channel])
        odd = mma.equals(arith.andi(column, warp.constant(1)), 1)
        factors = [mma.where(odd, warp.pack(values[k], values[k + 2])) for k in range(2)]
        d = mma.mma([*first, *second], factors, d, "bf16")
        # Row r of the result is state 4 (r // 2) + r % 2, row r + 8 the one 2 further.
        row = column
        state = arith.addi(
            arith.muli(arith.shrui(row, warp.constant(1)), warp.constant(4)), arith.andi(row, warp.constant(1))
        )
        m = mma.within_four()
        with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.ult, m, warp.constant(plan.M))):
            for k in range(2):
                position = [warp_index, arith.addi(state, warp.constant(2 * k)), m, warp.constant(0)]
                warp.store_vector(target, position, d[2 * k : 2 * k + 2])

    sums(ref, u, *flat)


def accumulate(plan: Plan, sums: list[Array], values: list[Array]) -> list[Array]:
    """Adds the values of each thread's two channels to running sums, of 11 bits of the values.

    Args:
        plan: the plan, whose threads are `TENSOR`.
        sums: two arrays [lanes, channels], four numbers of each thread, see `sum_states`.
        values: a list of `rows` arrays [lanes, channels].
    """
    threads = plan.threads
    if plan.interpret:
        split = jnp.sum(jnp.stack(values), axis=2).reshape(2, 2, 2, 2)  # see `sum_states`
        words = jnp.transpose(split, (0, 2, 1, 3)).reshape(threads.lanes, 4)
        words = jnp.pad(words, ((0, 2 * threads.channels - threads.lanes), (0, 0)))
        return [v + words[:, 2 * k : 2 * k + 2].reshape(threads.shape) for k, v in enumerate(sums)]
    like = plgpu.ShapeDtypeStruct(threads.shape, F32, layout=threads.layout)

    @plgpu.inline_mgpu(arg_types=[threads.layout] * (2 + threads.rows), return_type=[like] * 2)
    def add(ctx: Any, *arrays: Any) -> list[Any]:
        del ctx
        arith = warp.dialects()[1]
        before, v = ([warp.values(a) for a in part] for part in (arrays[:2], arrays[2:]))
        d = [*before[0], *before[1]]
        # States 0 and 1 (2 and 3) of lane q are rows with inner index q (q + 4), which becomes the column.
        column = arith.shrui(mma.lane(), warp.constant(2))
        mine = [arith.addi(mma.within_four(), warp.constant(k)) for k in (0, 4)]
        one = [arith.cmpi(arith.CmpIPredicate.eq, column, inner) for inner in mine]
        identity = [mma.where(condition, warp.constant(0x3F800000)) for condition in one]
        for c in range(2):
            d = mma.mma([row[c] for row in v], identity, d)
        return [warp.array(threads, d[:2]), warp.array(threads, d[2:])]

    return list(add(*sums, *values))


def sum_states(words: Array) -> Array:
    """What `accumulate` added up, [..., THREADS, 4] of all blocks -> [..., SLAB], sums over the threads."""
    lanes = jnp.sum(words.reshape(*words.shape[:-2], -1, 4, 4), axis=-3)
    # Lane q has columns 2 q and 2 q + 1 of row 0, then of row 1; column c is lane c % 4 and states 2 (c // 4) + row.
    split = lanes.reshape(*lanes.shape[:-2], 2, 2, 2, 2)
    return jnp.moveaxis(split, (-3, -1), (-4, -3)).reshape(*words.shape[:-2], -1)
