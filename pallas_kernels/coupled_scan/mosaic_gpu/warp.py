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

from pallas_kernels.coupled_scan.mosaic_gpu.plan import F32, Plan, Threads

Array = jax.Array


def save_thread(plan: Plan, ref: Any, state: list[Array]) -> None:
    """Stores a state so that each thread finds its own values again, [rows * vector / 4, THREADS, 4]."""
    rows, vector = plan.threads.rows, plan.threads.vector
    if plan.interpret:
        ref[...] = jnp.stack(state).reshape(rows // 4, 4, -1).transpose(0, 2, 1).reshape(ref.shape)
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
        stored = ref[...].reshape(threads.rows // 4, -1, 4).transpose(0, 2, 1)
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


def array(threads: Threads, values: list[Any]) -> Any:
    """An array [lanes, channels] of which this thread has `values`."""
    ir, _, _, vector = dialects()
    layout = threads.layout.to_mgpu()
    registers = np.empty(layout.registers_shape(threads.shape), dtype=object)
    registers[...] = vector.from_elements(ir.VectorType.get((threads.vector,), ir.F32Type.get()), values)
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def values(array: Any) -> list[Any]:
    """A thread's elements of an array of which it has one register."""
    register = array.registers.item()
    return [element(register, k) for k in range(register.type.shape[0])]


def load_vector(source: Any, position: list[Any], count: int = 4) -> list[Any]:
    """Neighbouring numbers at a position of a reference, by one instruction."""
    ir, _, _, vector = dialects()
    row = vector.load(ir.VectorType.get((count,), ir.F32Type.get()), source, [index(p) for p in position])
    return [element(row, k) for k in range(count)]


def store_vector(target: Any, position: list[Any], values: list[Any]) -> None:
    """The inverse of `load_vector`."""
    ir, _, _, vector = dialects()
    row = vector.from_elements(ir.VectorType.get((len(values),), ir.F32Type.get()), values)
    vector.store(row, target, [index(p) for p in position])
