"""What the kernels do below Pallas: loads and stores of whole vectors of a thread, and what that is built of.

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

from pallas_kernels._compat import is_interpreted
from pallas_kernels.coupled_scan.mosaic_gpu.plan import F32, THREADS, Plan, Threads

Array = jax.Array


def save_thread(plan: Plan, ref: Any, state: list[Array]) -> None:
    """Stores a state so that each thread finds its own values again, [rows * vector / 4, THREADS, 4] of 32 bits."""
    rows, vector = plan.threads.rows, plan.threads.vector
    if plan.interpret:
        stacked = jnp.stack(state).reshape(rows // 4, 4, -1).transpose(0, 2, 1).reshape(ref.shape)
        ref[...] = lax.bitcast_convert_type(stacked, ref.dtype)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *[plan.threads.layout] * rows))
    def write(ctx: Any, target: Any, *arrays: Any) -> None:
        del ctx
        for v in range(vector):
            for k in range(0, rows, 4):
                position = [constant((v * rows + k) // 4), thread(), constant(0)]
                store_vector(target, position, [values(array)[v] for array in arrays[k : k + 4]])

    write(ref, *state)


def load_thread(plan: Plan, ref: Any) -> list[Array]:
    """The inverse of `save_thread`."""
    threads = plan.threads
    if plan.interpret:
        stored = lax.bitcast_convert_type(ref[...], F32).reshape(threads.rows // 4, -1, 4).transpose(0, 2, 1)
        return list(stored.reshape(threads.rows, *threads.shape))
    like = plgpu.ShapeDtypeStruct(threads.shape, F32, layout=threads.layout)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=[like] * threads.rows)
    def read(ctx: Any, source: Any) -> list[Any]:
        del ctx
        columns = []
        for v in range(threads.vector):
            places = ([constant((v * threads.rows + k) // 4), thread(), constant(0)] for k in range(0, threads.rows, 4))
            columns.append([value for place in places for value in load_vector(source, place)])
        return [array(threads, list(elements)) for elements in zip(*columns, strict=True)]

    return list(read(ref))


def save_rounded(plan: Plan, ref: Any, state: list[Array]) -> None:
    """Stores a state of eight values a thread, rounded to bfloat16, as words [THREADS, 4], each thread its own."""
    if plan.interpret:
        pairs = jnp.stack(state).reshape(4, 2, -1).transpose(2, 0, 1).astype(jnp.bfloat16)
        ref[...] = lax.bitcast_convert_type(pairs.reshape(*ref.shape, 2), jnp.int32)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *[plan.threads.layout] * len(state)))
    def write(ctx: Any, target: Any, *arrays: Any) -> None:
        del ctx
        numbers = [v for row in arrays for v in values(row)]
        words = [pack(*numbers[k : k + 2]) for k in range(0, len(numbers), 2)]
        store_vector(target, [thread(), constant(0)], words)

    write(ref, *state)


def save_words(plan: Plan, ref: Any, words: list[Array]) -> None:
    """Stores two arrays [lanes, channels], four words of each thread, as [THREADS, 4]."""
    if plan.interpret:
        ref[...] = lax.bitcast_convert_type(jnp.concatenate([v.reshape(-1, 2) for v in words], axis=1), ref.dtype)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *[plan.threads.layout] * 2))
    def write(ctx: Any, target: Any, *arrays: Any) -> None:
        del ctx
        store_vector(target, [thread(), constant(0)], [*values(arrays[0]), *values(arrays[1])])

    write(ref, *words)


def load_words(plan: Plan, ref: Any) -> list[Array]:
    """The inverse of `save_words`."""
    threads = plan.threads
    if plan.interpret:
        words = lax.bitcast_convert_type(ref[...], F32)
        return [words[:, k : k + 2].reshape(threads.shape) for k in (0, 2)]
    like = plgpu.ShapeDtypeStruct(threads.shape, F32, layout=threads.layout)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=[like] * 2)
    def read(ctx: Any, source: Any) -> list[Any]:
        del ctx
        words = load_vector(source, [thread(), constant(0)])
        return [array(threads, words[k : k + 2]) for k in (0, 2)]

    return list(read(ref))


def unpack_words(plan: Plan, words: list[Array]) -> list[Array]:
    """A state from what `load_words` loads of what `save_rounded` stored."""
    threads = plan.threads
    if plan.interpret:
        pairs = lax.bitcast_convert_type(jnp.concatenate([v.reshape(-1, 2) for v in words], axis=1), jnp.bfloat16)
        return list(pairs.astype(F32).transpose(1, 2, 0).reshape(-1, *threads.shape))
    like = plgpu.ShapeDtypeStruct(threads.shape, F32, layout=threads.layout)

    @plgpu.inline_mgpu(arg_types=[threads.layout] * 2, return_type=[like] * 4)
    def unpack(ctx: Any, *arrays: Any) -> list[Any]:
        del ctx
        ir, arith, _, _ = dialects()
        i32 = ir.IntegerType.get_signless(32)
        rows = []
        for word in (arith.bitcast(i32, v) for v in (*values(arrays[0]), *values(arrays[1]))):
            rows.append(array(threads, [arith.shli(word, constant(16)), arith.andi(word, constant(-65536))]))
        return rows

    return list(unpack(*words))


def load_projection(plan: Plan, ref: Any) -> list[Array]:
    """One step's B or C, a reference [SLAB] -> a list of `rows` arrays [lanes, channels]."""
    threads = plan.threads
    if plan.interpret:
        values = ref[...].reshape(threads.lanes, threads.rows)
        return [lax.broadcast_in_dim(values[:, i], threads.shape, (0,)) for i in range(threads.rows)]

    def position(k: int) -> list[Any]:
        arith = dialects()[1]
        if threads.lanes == 2:
            lane = arith.shrui(arith.andi(thread(), constant(31)), constant(4))
        else:
            lane = arith.andi(thread(), constant(3))
        return [arith.addi(arith.muli(lane, constant(threads.rows)), constant(4 * k))]

    return load_vectors(plan, ref, position)


def load_vectors(plan: Plan, ref: Any, position: Callable[[int], list[Any]]) -> list[Array]:
    """`rows` numbers of each thread, the same for all its channels, from `position(0)`, `position(1)` and so on.

    The compiler would not always see that four of them are neighbours.
    """
    threads = plan.threads
    like = plgpu.ShapeDtypeStruct(threads.shape, F32, layout=threads.layout)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=[like] * threads.rows)
    def read(ctx: Any, source: Any) -> list[Any]:
        del ctx
        numbers = [v for k in range(threads.rows // 4) for v in load_vector(source, position(k))]
        return [array(threads, [v] * threads.vector) for v in numbers]

    return list(read(ref))


def widen(values: Array, layout: Any) -> Array:
    """An array as float32; of two neighbouring bfloat16 by one instruction each, where the compiler takes three."""
    alone = values.size <= THREADS  # a thread has one element, no neighbours
    if values.dtype == F32 or alone or is_interpreted():
        return values.astype(F32)

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(values.shape, F32, layout=layout))
    def convert(ctx: Any, array: Any) -> Any:
        del ctx
        ir, arith, _, vector = dialects()
        f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)

        def register(narrow: Any) -> Any:
            count = narrow.type.shape[0]
            words = vector.bitcast(ir.VectorType.get((count // 2,), i32), narrow)
            halves = []
            for word in (element(words, k) for k in range(count // 2)):
                halves += [arith.shli(word, constant(16)), arith.andi(word, constant(-65536))]
            return vector.from_elements(ir.VectorType.get((count,), f32), [arith.bitcast(f32, v) for v in halves])

        registers = np.empty_like(array.registers)
        registers.flat[:] = [register(narrow) for narrow in array.registers.flat]
        return mgpu.FragmentedArray(_registers=registers, _layout=array.layout, _is_signed=None)

    return convert(values)


def barrier() -> None:
    """Waits for the other warps of the warpgroup; what they wrote to shared memory can be read."""

    @plgpu.inline_mgpu()
    def wait(ctx: Any) -> None:
        del ctx
        mgpu.utils.warpgroup_barrier()

    wait()


def dialects() -> Any:
    """The parts of MLIR that what follows is written in: ir, arith, llvm, vector."""
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import arith, llvm, vector

    return ir, arith, llvm, vector


def constant(value: int) -> Any:
    """A 32-bit integer."""
    ir, arith, _, _ = dialects()
    return arith.constant(ir.IntegerType.get_signless(32), value)


def index(value: Any) -> Any:
    """An integer as a position in memory."""
    ir, arith, _, _ = dialects()
    return arith.index_cast(ir.IndexType.get(), value)


def thread() -> Any:
    """Of its warpgroup."""
    _, arith, _, _ = dialects()
    return arith.andi(mgpu.utils.thread_idx(), constant(127))


def element(values: Any, k: int) -> Any:
    """One of a register of several numbers."""
    ir, _, _, vector = dialects()
    return vector.extract(values, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([k]))


def pack(low: Any, high: Any) -> Any:
    """Two float32 as a word of two bfloat16."""
    ir, _, llvm, _ = dialects()
    i32 = ir.IntegerType.get_signless(32)
    return llvm.inline_asm(i32, [high, low], "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f", has_side_effects=False)


def array(threads: Threads, values: list[Any]) -> Any:
    """An array [lanes, channels] of which this thread has `values`."""
    ir, arith, _, vector = dialects()
    f32, layout = ir.F32Type.get(), threads.layout.to_mgpu()
    values = [v if v.type == f32 else arith.bitcast(f32, v) for v in values]
    registers = np.empty(layout.registers_shape(threads.shape), dtype=object)
    registers[...] = vector.from_elements(ir.VectorType.get((threads.vector,), f32), values)
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def values(array: Any) -> list[Any]:
    """A thread's elements of an array of which it has one register."""
    register = array.registers.item()
    return [element(register, k) for k in range(register.type.shape[0])]


def load_vector(source: Any, position: list[Any], count: int = 4) -> list[Any]:
    """Neighbouring numbers (or words) at a position of a reference, by one instruction."""
    ir, _, _, vector = dialects()
    kind = ir.MemRefType(source.type).element_type
    row = vector.load(ir.VectorType.get((count,), kind), source, [index(p) for p in position])
    return [element(row, k) for k in range(count)]


def load_pairs(source: Any, position: list[Any]) -> list[Any]:
    """Four neighbouring bfloat16 at a position of a reference, as two words."""
    ir, _, _, vector = dialects()
    row = vector.load(ir.VectorType.get((4,), ir.BF16Type.get()), source, [index(p) for p in position])
    words = vector.bitcast(ir.VectorType.get((2,), ir.IntegerType.get_signless(32)), row)
    return [element(words, k) for k in range(2)]


def store_vector(target: Any, position: list[Any], values: list[Any]) -> None:
    """The inverse of `load_vector`."""
    ir, arith, _, vector = dialects()
    kind = ir.MemRefType(target.type).element_type
    values = [v if v.type == kind else arith.bitcast(kind, v) for v in values]
    row = vector.from_elements(ir.VectorType.get((len(values),), kind), values)
    vector.store(row, target, [index(p) for p in position])
