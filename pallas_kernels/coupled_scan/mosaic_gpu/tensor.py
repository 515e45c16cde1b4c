"""Products on the tensor cores, which see 11 bits of each factor.

Axes: M modality, N state, D channel; arrays [lanes, channels] lie over the threads as `plan.Threads` says.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.coupled_scan.mosaic_gpu import mma, warp
from pallas_kernels.coupled_scan.mosaic_gpu.plan import F32, FACTOR_LAYOUT, Plan

Array = jax.Array


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
            d = mma.mma(_rows(u), [warp.values(B)[j]])
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
            d = mma.mma([*_rows(v[i]), *_rows(v[i + 1])], c[i : i + 2], d)
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
            factors = [mma.where(mma.equals(mma.within_four(), m), v) for v in factors]
        for j, factor in enumerate(factors):  # see `outer_products`
            d = mma.mma(warp.values(u), [factor], [before[2 * i + j][v] for v in range(2) for i in range(2)])
            for i in range(2):
                after[2 * i + j] = warp.array(threads, d[i::2])
        return after

    return list(multiply(u, C, *state))


def load_columns(plan: Plan, ref: Any) -> list[Array]:
    """C of one step, a reference [4, SLAB], as `dot_column` takes it."""
    if plan.interpret:
        return [ref[...]]

    def position(k: int) -> list[Any]:
        arith = warp.dialects()[1]
        return [arith.shrui(mma.lane(), warp.constant(3)), arith.muli(mma.within_four(), warp.constant(4))]

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


def pack(plan: Plan, rows: list[Array], factor: Array | None = None) -> list[Array]:
    """`rows` arrays as words of two bfloat16, an array [lanes, channels] of words for each channel of a thread.

    Args:
        plan: the plan, whose threads are `TENSOR`.
        rows: a list of arrays [lanes, channels].
        factor: an array [lanes, channels]: times this, the two channels of each thread added up.
    """
    threads = plan.threads
    if plan.interpret:
        return rows if factor is None else [factor * row for row in rows]
    given, count = (rows, 2) if factor is None else ([*rows, factor], 1)
    like = plgpu.ShapeDtypeStruct(threads.shape, F32, layout=threads.layout)

    @plgpu.inline_mgpu(arg_types=[threads.layout] * len(given), return_type=[like] * count)
    def packed(ctx: Any, *arrays: Any) -> Any:
        del ctx
        _, arith, _, _ = warp.dialects()
        fuse, values = arith.FastMathFlags.contract, [warp.values(v) for v in arrays]
        columns = [[v[k] for v in values] for k in range(2)]
        if factor is not None:
            terms = [[arith.mulf(v, column[-1], fastmath=fuse) for v in column[:-1]] for column in columns]
            columns = [[arith.addf(*pair, fastmath=fuse) for pair in zip(*terms, strict=True)]]
        return [warp.array(threads, [warp.pack(*column[:2]), warp.pack(*column[2:])]) for column in columns]

    return list(packed(*given))


def dot_packed(plan: Plan, packed: list[Array], ref: Any) -> Array:
    """SUM_n B_mn values_n for every modality, of 8 bits of the values.

    Args:
        plan: the plan, whose threads are `TENSOR`.
        packed: the values, see `pack`.
        ref: B of one step, a reference [M, SLAB] of bfloat16.

    Returns:
        [4, channels] as [lanes, channels], one modality a lane; anything beyond M.
    """
    threads = plan.threads
    if plan.interpret:
        values = jnp.stack(packed, axis=1).reshape(-1, threads.channels)
        dots = jnp.einsum("nc,mn->mc", values, ref[...].astype(F32))
        return jnp.pad(dots, ((0, threads.lanes - plan.M), (0, 0)))
    like = plgpu.ShapeDtypeStruct(threads.shape, F32, layout=threads.layout)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *[threads.layout] * 2), return_type=like)
    def multiply(ctx: Any, source: Any, *arrays: Any) -> Any:
        del ctx
        arith = warp.dialects()[1]
        # Inner index k is state k % 8 // 2 * 4 + k % 2 of the first two of each lane, then of the other two.
        first, second = (warp.values(v) for v in arrays)
        m = arith.minui(arith.shrui(mma.lane(), warp.constant(3)), warp.constant(plan.M - 1))
        B = warp.load_pairs(source, [m, arith.muli(mma.within_four(), warp.constant(4))])
        d = mma.mma([first[0], second[0], first[1], second[1]], B, kind="bf16")
        return warp.array(threads, d[::2])

    return multiply(ref, *packed)


def store_modalities(plan: Plan, ref: Any, values: Array) -> None:
    """Stores the modalities that there are of [4, channels] as [lanes, channels], whose threads are `TENSOR`."""
    if plan.interpret:
        ref[: plan.M] = values[: plan.M]
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plan.threads.layout))
    def write(ctx: Any, target: Any, values: Any) -> None:
        del ctx
        arith, m = warp.dialects()[1], mma.within_four()
        pair = arith.addi(arith.muli(mma.own_warp(), warp.constant(8)), arith.shrui(mma.lane(), warp.constant(2)))
        with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.ult, m, warp.constant(plan.M))):
            warp.store_vector(target, [m, arith.muli(pair, warp.constant(2))], warp.values(values))

    write(ref, values)


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
            d = mma.mma(warp.values(part), [mma.ones(0x3F800000, 2 * m)], d)
        return warp.array(threads, d[::2])

    return sums(*parts)


def _rows(array: Any) -> list[Any]:
    """A thread's part of a factor [16, 4]: its one or two channels are rows l // 4 and l // 4 + 8, the rest is zero."""
    _, arith, _, _ = warp.dialects()
    values = warp.values(array)
    zero = arith.constant(values[0].type, 0.0)
    return values if len(values) == 2 else [*values, zero]
