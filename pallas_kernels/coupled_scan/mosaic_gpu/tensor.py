"""Products and sums on the tensor cores, which see 11 bits of each factor.

Axes: M modality, N state, D channel; arrays [lanes, channels] lie over the threads as `plan.Threads` says.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.coupled_scan.mosaic_gpu import warp
from pallas_kernels.coupled_scan.mosaic_gpu.plan import F32, FACTOR_LAYOUT, Plan

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


def outer_products(plan: Plan, u: Array, B: Array) -> list[Array]:
    """SUM_m u_m B_m on the tensor cores, which see 11 bits of each factor.

    Args:
        plan: the plan, whose threads are `TENSOR` or `NARROW_TENSOR`.
        u: [4, channels] as [lanes, channels], one modality a lane.
        B: [4, SLAB] in `FACTOR_LAYOUT`.

    Returns:
        A list of `rows` arrays [lanes, channels].
    """
    threads = plan.threads
    if plan.interpret:
        sums = jnp.einsum("mc,mn->nc", u, B).reshape(threads.lanes, threads.rows, threads.channels)
        return [sums[:, i] for i in range(threads.rows)]
    like = plgpu.ShapeDtypeStruct(threads.shape, F32, layout=threads.layout)

    @plgpu.inline_mgpu(arg_types=(threads.layout, FACTOR_LAYOUT), return_type=[like] * threads.rows)
    def multiply(ctx: Any, u: Any, B: Any) -> list[Any]:
        del ctx
        rows: list[Any] = [None] * threads.rows
        for j in range(2):
            d = _mma(_rows(u), [warp.values(B)[j]])
            # Column n of this product is state 2 n + j; lane l has columns 2 (l % 4) and the next.
            for i in range(2):
                rows[2 * i + j] = warp.array(threads, d[i::2][: threads.vector])
        return rows

    return list(multiply(u, B))


def dot_states(plan: Plan, values: list[Array], C: list[Array]) -> Array:
    """SUM_n C_n values_n on the tensor cores, which see 11 bits of each factor.

    Args:
        plan: the plan, whose threads are `TENSOR` or `NARROW_TENSOR`.
        values: a list of `rows` arrays [lanes, channels].
        C: the same for C, as `load_projection` returns it.

    Returns:
        [lanes, channels], the same in every lane.
    """
    threads = plan.threads
    if plan.interpret:
        total = jnp.sum(sum(v * c for v, c in zip(values, C, strict=True)), axis=0)
        return lax.broadcast_in_dim(total, threads.shape, (1,))
    like = plgpu.ShapeDtypeStruct(threads.shape, F32, layout=threads.layout)

    @plgpu.inline_mgpu(arg_types=[threads.layout] * (2 * threads.rows), return_type=like)
    def multiply(ctx: Any, *arrays: Any) -> Any:
        del ctx
        v, c = arrays[: threads.rows], [warp.values(array)[0] for array in arrays[threads.rows :]]
        d = None
        # Inner index k is state k % 4 * rows + k // 4 of the first two of each lane, then of the other two.
        for i in range(0, threads.rows, 2):
            d = _mma([*_rows(v[i]), *_rows(v[i + 1])], c[i : i + 2], d)
        return warp.array(threads, d[::2][: threads.vector])

    return multiply(*values, *C)


def add_outer_product(plan: Plan, state: list[Array], u: Array, C: Array, m: int | None) -> list[Array]:
    """state + u_m C_m; m None: the sum over all modalities.

    Args:
        plan: the plan, whose threads are `TENSOR`.
        state: a list of `rows` arrays [lanes, channels], added exactly.
        u: [4, channels] as [lanes, channels], one modality a lane.
        C: [4, SLAB] in `FACTOR_LAYOUT`.
        m: the modality.

    Returns:
        A list like `state`.
    """
    threads = plan.threads
    if plan.interpret:
        only = slice(None) if m is None else slice(m, m + 1)
        sums = jnp.einsum("mc,mn->nc", u[only], C[only]).reshape(threads.lanes, threads.rows, threads.channels)
        return [v + sums[:, i] for i, v in enumerate(state)]
    like = plgpu.ShapeDtypeStruct(threads.shape, F32, layout=threads.layout)
    types = [threads.layout, FACTOR_LAYOUT, *[threads.layout] * threads.rows]

    @plgpu.inline_mgpu(arg_types=types, return_type=[like] * threads.rows)
    def multiply(ctx: Any, u: Any, C: Any, *state: Any) -> list[Any]:
        del ctx
        factors, before, after = warp.values(C), [warp.values(v) for v in state], [None] * threads.rows
        if m is not None:
            factors = [_where(_is(_within_four(), m), v) for v in factors]
        for j, factor in enumerate(factors):  # see `outer_products`
            d = _mma(warp.values(u), [factor], [before[2 * i + j][v] for v in range(2) for i in range(2)])
            for i in range(2):
                after[2 * i + j] = warp.array(threads, d[i::2])
        return after

    return list(multiply(u, C, *state))


def load_columns(plan: Plan, ref: Any) -> list[Array]:
    """B or C of one step, a reference [4, SLAB], as `dot_modalities` takes it."""
    if plan.interpret:
        return [ref[...]]

    def position(k: int) -> list[Any]:
        arith = warp.dialects()[1]
        return [arith.shrui(_lane(), warp.constant(3)), arith.muli(_within_four(), warp.constant(4))]

    return warp.load_vectors(plan, ref, position)


def dot_column(plan: Plan, values: list[Array], C: list[Array]) -> Array:
    """SUM_n C_mn values_n for every modality.

    Args:
        plan: the plan, whose threads are `TENSOR`.
        values: a list of `rows` arrays [lanes, channels].
        C: see `load_columns`.

    Returns:
        [4, channels] as [lanes, channels], one modality a lane.
    """
    if plan.interpret:
        return jnp.einsum("nc,mn->mc", jnp.stack(values, axis=1).reshape(-1, plan.threads.channels), C[0])
    return dot_states(plan, values, C)  # modality m is column 2 m (and the next), which lane m of four has


def sum_lanes(plan: Plan, parts: list[Array]) -> Array:
    """Sums [lanes, channels] of each modality over the lanes -> [4, channels] as [lanes, channels], one a lane."""
    threads = plan.threads
    if plan.interpret:
        sums = jnp.stack([jnp.sum(part, axis=0) for part in parts])
        return jnp.pad(sums, ((0, threads.lanes - len(parts)), (0, 0)))
    like = plgpu.ShapeDtypeStruct(threads.shape, F32, layout=threads.layout)

    @plgpu.inline_mgpu(arg_types=[threads.layout] * len(parts), return_type=like)
    def sums(ctx: Any, *arrays: Any) -> Any:
        del ctx
        d = None
        for m, part in enumerate(arrays):
            d = _mma(warp.values(part), [_ones(0x3F800000, 2 * m)], d)
        return warp.array(threads, d[::2])

    return sums(*parts)


def turn(plan: Plan, rows: list[Array], *, pairs: bool = False) -> list[Array]:
    """What `sum_turned` takes: `rows` arrays as bfloat16 with the channels where the states were.

    Args:
        plan: the plan, whose threads are `TENSOR`.
        rows: a list of arrays [lanes, channels].
        pairs: whether the two channels of each thread are added up first.
    """
    threads = plan.threads
    if plan.interpret:
        return rows
    count = 1 if pairs else 2
    like = plgpu.ShapeDtypeStruct(threads.shape, F32, layout=threads.layout)

    @plgpu.inline_mgpu(arg_types=[threads.layout] * threads.rows, return_type=[like] * count)
    def transposed(ctx: Any, *arrays: Any) -> Any:
        del ctx
        ir, arith, llvm, _ = warp.dialects()
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        values = [warp.values(v) for v in arrays]
        columns = [[arith.addf(v[0], v[1]) for v in values]] if pairs else [[v[k] for v in values] for k in range(2)]
        results = []
        for column in columns:
            words = []
            for low, high in (column[:2], column[2:]):
                code = "{ .reg .b32 t; cvt.rn.bf16x2.f32 t, $1, $2; movmatrix.sync.aligned.m8n8.trans.b16 $0, t; }"
                words.append(llvm.inline_asm(i32, [high, low], code, "=r,f,f", has_side_effects=False))
            results.append(warp.array(threads, [arith.bitcast(f32, word) for word in words]))
        return results

    return list(transposed(*rows))


def sum_turned(plan: Plan, by_modality: list[list[Array]], shared: list[Array], u: Any, ref: Any) -> None:
    """Sums over the channels of each warp, of `by_modality` and of u_m times `shared`.

    Args:
        plan: the plan, whose threads are `TENSOR`.
        by_modality: for each modality what `turn` returns, with `pairs`.
        shared: what `turn` returns, without.
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
            d = _mma(words, [_ones(0x3F803F80, 2 * m)], d, "bf16")
        # Column 2 m + 1 is for u_m: its rows are the channels 2 k of a warp, then 2 k + 1, as those of `shared`.
        column, warp_index = arith.shrui(_lane(), warp.constant(2)), arith.shrui(warp.thread(), warp.constant(5))
        channel = arith.addi(arith.muli(warp_index, warp.constant(16)), arith.muli(_within_four(), warp.constant(4)))
        values = warp.load_vector(u, [arith.shrui(column, warp.constant(1)), channel])
        odd = _is(arith.andi(column, warp.constant(1)), 1)
        factors = [_where(odd, _pack(values[k], values[k + 2])) for k in range(2)]
        d = _mma([*first, *second], factors, d, "bf16")
        # Row r of the result is state 4 (r // 2) + r % 2, row r + 8 the one 2 further.
        row = column
        state = arith.addi(
            arith.muli(arith.shrui(row, warp.constant(1)), warp.constant(4)), arith.andi(row, warp.constant(1))
        )
        m = _within_four()
        with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.ult, m, warp.constant(plan.M))):
            for k in range(2):
                position = [warp_index, arith.addi(state, warp.constant(2 * k)), m, warp.constant(0)]
                warp.store_vector(target, position, d[2 * k : 2 * k + 2])

    sums(ref, u, *flat)


def _rows(array: Any) -> list[Any]:
    """A thread's part of a factor [16, 4]: its one or two channels are rows l // 4 and l // 4 + 8, the rest is zero."""
    _, arith, _, _ = warp.dialects()
    values = warp.values(array)
    zero = arith.constant(values[0].type, 0.0)
    return values if len(values) == 2 else [*values, zero]


def _mma(a: list[Any], b: list[Any], acc: list[Any] | None = None, kind: str = "tf32") -> list[Any]:
    """A [16, k] B [k, 8] + acc, k = 4 or 8 (bf16: 8 or 16); a, b list a thread's words in the instruction's order."""
    ir, arith, llvm, _ = warp.dialects()
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    acc = acc or [arith.constant(f32, 0.0)] * 4
    inputs = [v if v.type == i32 else arith.bitcast(i32, v) for v in [*a, *b]]
    places = iter(range(4, 8 + len(inputs)))
    groups = ["{" + ", ".join(f"${next(places)}" for _ in group) + "}" for group in (a, b, acc)]
    shape = f"m16n8k{len(b) * (4 if kind == 'tf32' else 8)}"
    code = f"mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32 {{$0, $1, $2, $3}}, {', '.join(groups)};"
    constraints = ",".join(["=f"] * 4 + ["r"] * len(inputs) + ["f"] * 4)
    result_type = llvm.StructType.get_literal([f32] * 4)
    out = llvm.inline_asm(result_type, [*inputs, *acc], code, constraints, has_side_effects=False)
    return [llvm.extractvalue(f32, out, [k]) for k in range(4)]


def _pack(low: Any, high: Any) -> Any:
    """Two float32 as a word of two bfloat16."""
    ir, _, llvm, _ = warp.dialects()
    i32 = ir.IntegerType.get_signless(32)
    return llvm.inline_asm(i32, [high, low], "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f", has_side_effects=False)


def _lane() -> Any:
    """Of the thread in its warp."""
    return warp.dialects()[1].andi(warp.thread(), warp.constant(31))


def _within_four() -> Any:
    """Of the thread among its four neighbours."""
    return warp.dialects()[1].andi(warp.thread(), warp.constant(3))


def _is(value: Any, number: int) -> Any:
    arith = warp.dialects()[1]
    return arith.cmpi(arith.CmpIPredicate.eq, value, warp.constant(number))


def _where(condition: Any, yes: Any, no: Any = None) -> Any:
    """One of two numbers; `no` is zero if not given."""
    arith = warp.dialects()[1]
    zero = warp.constant(0) if str(yes.type) == "i32" else arith.constant(yes.type, 0.0)
    return arith.select(condition, yes, zero if no is None else no)


def _ones(one: int, column: int) -> Any:
    """A thread's word of a factor [k, 8] that has ones in one column."""
    arith = warp.dialects()[1]
    return _where(_is(arith.shrui(_lane(), warp.constant(2)), column), warp.constant(one))


def _sum_over_lanes(target: Any, products: list[Any], exact: bool) -> None:
    ir, arith, _, _ = warp.dialects()
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    lane, own_warp = arith.andi(warp.thread(), warp.constant(31)), arith.shrui(warp.thread(), warp.constant(5))
    four, within = arith.shrui(lane, warp.constant(2)), arith.andi(lane, warp.constant(3))
    acc = None
    for quarter in range(4):
        values = products[4 * quarter : 4 * quarter + 4]
        # Lane l holds row l // 4, column l % 4 (and + 8, + 4) of A. B sends the sum of columns 0 to 3 to column
        # 2 quarter of the result and that of 4 to 7 to the next; lane l receives columns 2 (l % 4) and the next.
        ones = [
            arith.select(
                arith.cmpi(arith.CmpIPredicate.eq, four, warp.constant(2 * quarter + k)),
                warp.constant(0x3F800000),
                warp.constant(0),
            )
            for k in range(2)
        ]
        parts = [values]
        if exact:
            high = [arith.bitcast(f32, arith.andi(arith.bitcast(i32, v), warp.constant(-8192))) for v in values]
            parts = [high, [arith.subf(v, h) for v, h in zip(values, high, strict=True)]]
        for part in parts:
            acc = _mma([part[k] for k in (0, 2, 1, 3)], ones, acc)
    # Lane l has arrays 4 (l % 4) to 4 (l % 4) + 3, summed over the lanes of l // 4: add the other groups of its warp.
    for distance in (4, 8):
        acc = [arith.addf(v, mgpu.utils.shfl_bfly(v, distance)) for v in acc]
    shared = arith.shrui(lane, warp.constant(4))
    first_row = arith.muli(arith.andi(within, warp.constant(1)), warp.constant(4))
    warp.store_vector(target, [own_warp, arith.shrui(within, warp.constant(1)), shared, first_row], acc)
