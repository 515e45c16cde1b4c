"""What the kernels do below Pallas: loads and stores of whole vectors of a thread, and products on the tensor cores.

Axes: M modality, N state, D channel; arrays [lanes, channels] lie over the threads as `plan.Threads` says.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.coupled_scan.mosaic_gpu.plan import F32, FACTOR_LAYOUT, Plan, Threads

Array = jax.Array


def save_thread(plan: Plan, ref: Any, state: list[Array]) -> None:
    """Stores a state so that each thread finds its own values again, [rows / 4, THREADS, 4]."""
    rows = plan.threads.rows
    if plan.interpret:
        ref[...] = jnp.stack(state).reshape(rows // 4, 4, -1).transpose(0, 2, 1)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *[plan.threads.layout] * rows))
    def write(ctx: Any, target: Any, *arrays: Any) -> None:
        del ctx
        for k in range(0, rows, 4):
            _store_vector(
                target, [_constant(k // 4), _thread(), _constant(0)], [_values(a)[0] for a in arrays[k : k + 4]]
            )

    write(ref, *state)


def load_thread(plan: Plan, ref: Any) -> list[Array]:
    """The inverse of `save_thread`."""
    rows = plan.threads.rows
    if plan.interpret:
        values = ref[...].transpose(0, 2, 1).reshape(rows, *plan.threads.shape)
        return [values[i] for i in range(rows)]
    return _load_vectors(plan, ref, lambda k: [_constant(k), _thread(), _constant(0)])


def load_projection(plan: Plan, ref: Any) -> list[Array]:
    """One step's B or C, a reference [SLAB] -> a list of `rows` arrays [lanes, channels]."""
    threads = plan.threads
    if plan.interpret:
        values = ref[...].reshape(threads.lanes, threads.rows)
        return [lax.broadcast_in_dim(values[:, i], threads.shape, (0,)) for i in range(threads.rows)]

    def position(k: int) -> list[Any]:
        arith = _dialects()[1]
        if threads.lanes == 2:
            lane = arith.shrui(arith.andi(_thread(), _constant(31)), _constant(4))
        else:
            lane = arith.andi(_thread(), _constant(3))
        return [arith.addi(arith.muli(lane, _constant(threads.rows)), _constant(4 * k))]

    return _load_vectors(plan, ref, position)


def _load_vectors(plan: Plan, ref: Any, position: Callable[[int], list[Any]]) -> list[Array]:
    """`rows` numbers of each thread, four at a time from `position(0)`, `position(1)` and so on.

    The compiler would not always see that they are neighbours.
    """
    threads = plan.threads
    like = plgpu.ShapeDtypeStruct(threads.shape, F32, layout=threads.layout)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=[like] * threads.rows)
    def read(ctx: Any, source: Any) -> list[Any]:
        del ctx
        ir, _, _, vector = _dialects()
        f32 = ir.F32Type.get()
        register = ir.VectorType.get((threads.vector,), f32)
        layout, arrays = threads.layout.to_mgpu(), []
        for k in range(threads.rows // 4):
            row = vector.load(ir.VectorType.get((4,), f32), source, [_index(v) for v in position(k)])
            for j in range(4):
                registers = np.empty(layout.registers_shape(threads.shape), dtype=object)
                registers[...] = vector.broadcast(register, _element(row, j))
                arrays.append(mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None))
        return arrays

    return list(read(ref))


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
        _sum_over_lanes(target, [_values(a)[0] for a in arrays], exact)

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
            d = _mma(_rows(u), [_values(B)[j]])
            # Column n of this product is state 2 n + j; lane l has columns 2 (l % 4) and the next.
            for i in range(2):
                rows[2 * i + j] = _array(threads, d[i::2][: threads.vector])
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
        v, c = arrays[: threads.rows], [_values(array)[0] for array in arrays[threads.rows :]]
        d = None
        # Inner index k is state k % 4 * rows + k // 4 of the first two of each lane, then of the other two.
        for i in range(0, threads.rows, 2):
            d = _mma([*_rows(v[i]), *_rows(v[i + 1])], c[i : i + 2], d)
        return _array(threads, d[::2][: threads.vector])

    return multiply(*values, *C)


def _dialects() -> Any:
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import arith, llvm, vector

    return ir, arith, llvm, vector


def _constant(value: int) -> Any:
    ir, arith, _, _ = _dialects()
    return arith.constant(ir.IntegerType.get_signless(32), value)


def _index(value: Any) -> Any:
    ir, arith, _, _ = _dialects()
    return arith.index_cast(ir.IndexType.get(), value)


def _thread() -> Any:
    _, arith, _, _ = _dialects()
    return arith.andi(mgpu.utils.thread_idx(), _constant(127))


def _element(values: Any, k: int) -> Any:
    ir, _, _, vector = _dialects()
    return vector.extract(values, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([k]))


def _rows(array: Any) -> list[Any]:
    """A thread's part of a factor [16, 4]: its one or two channels are rows l // 4 and l // 4 + 8, the rest is zero."""
    _, arith, _, _ = _dialects()
    values = _values(array)
    zero = arith.constant(values[0].type, 0.0)
    return values if len(values) == 2 else [*values, zero]


def _mma(a: list[Any], b: list[Any], acc: list[Any] | None = None) -> list[Any]:
    """A [16, k] B [k, 8] + acc, k = 4 or 8; a and b list a thread's elements in the order of the instruction."""
    ir, arith, llvm, _ = _dialects()
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    acc = acc or [arith.constant(f32, 0.0)] * 4
    inputs = [v if v.type == i32 else arith.bitcast(i32, v) for v in [*a, *b]]
    places = iter(range(4, 8 + len(inputs)))
    groups = ["{" + ", ".join(f"${next(places)}" for _ in group) + "}" for group in (a, b, acc)]
    code = f"mma.sync.aligned.m16n8k{4 * len(b)}.row.col.f32.tf32.tf32.f32 {{$0, $1, $2, $3}}, {', '.join(groups)};"
    constraints = ",".join(["=f"] * 4 + ["r"] * len(inputs) + ["f"] * 4)
    result_type = llvm.StructType.get_literal([f32] * 4)
    out = llvm.inline_asm(result_type, [*inputs, *acc], code, constraints, has_side_effects=False)
    return [llvm.extractvalue(f32, out, [k]) for k in range(4)]


def _array(threads: Threads, values: list[Any]) -> Any:
    """An array [lanes, channels] of which this thread has `values`."""
    ir, _, _, vector = _dialects()
    layout = threads.layout.to_mgpu()
    registers = np.empty(layout.registers_shape(threads.shape), dtype=object)
    registers[...] = vector.from_elements(ir.VectorType.get((threads.vector,), ir.F32Type.get()), values)
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def _values(array: Any) -> list[Any]:
    """A thread's elements of an array of which it has one register."""
    register = array.registers.item()
    return [_element(register, k) for k in range(register.type.shape[0])]


def _store_vector(target: Any, position: list[Any], values: list[Any]) -> None:
    ir, _, _, vector = _dialects()
    row = vector.from_elements(ir.VectorType.get((len(values),), ir.F32Type.get()), values)
    vector.store(row, target, [_index(p) for p in position])


def _sum_over_lanes(target: Any, products: list[Any], exact: bool) -> None:
    ir, arith, _, _ = _dialects()
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    lane, warp = arith.andi(_thread(), _constant(31)), arith.shrui(_thread(), _constant(5))
    four, within = arith.shrui(lane, _constant(2)), arith.andi(lane, _constant(3))
    acc = None
    for quarter in range(4):
        values = products[4 * quarter : 4 * quarter + 4]
        # Lane l holds row l // 4, column l % 4 (and + 8, + 4) of A. B sends the sum of columns 0 to 3 to column
        # 2 quarter of the result and that of 4 to 7 to the next; lane l receives columns 2 (l % 4) and the next.
        ones = [
            arith.select(
                arith.cmpi(arith.CmpIPredicate.eq, four, _constant(2 * quarter + k)),
                _constant(0x3F800000),
                _constant(0),
            )
            for k in range(2)
        ]
        parts = [values]
        if exact:
            high = [arith.bitcast(f32, arith.andi(arith.bitcast(i32, v), _constant(-8192))) for v in values]
            parts = [high, [arith.subf(v, h) for v, h in zip(values, high, strict=True)]]
        for part in parts:
            acc = _mma([part[k] for k in (0, 2, 1, 3)], ones, acc)
    # Lane l has arrays 4 (l % 4) to 4 (l % 4) + 3, summed over the lanes of l // 4: add the other groups of its warp.
    for distance in (4, 8):
        acc = [arith.addf(v, mgpu.utils.shfl_bfly(v, distance)) for v in acc]
    shared = arith.shrui(lane, _constant(4))
    first_row = arith.muli(arith.andi(within, _constant(1)), _constant(4))
    _store_vector(target, [warp, arith.shrui(within, _constant(1)), shared, first_row], acc)
