"""What the forward and the backward kernel do alike: loads, spreads, elementwise maths and one step of the recurrence.

Axes: M modality, N state, D channel; a state is `State`: for each of S chains a list of arrays [lanes, channels] (see
`plan.Threads`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._compat import layout_cast, load, store
from pallas_kernels.coupled_scan.mosaic_gpu.plan import F32, Plan, projection_layout

Array = jax.Array
Refs = dict[str, Any]
State = list[list[Array]]


def spread_channels(plan: Plan, values: Array) -> Array:
    """[channels] -> [lanes, channels]."""
    threads = plan.threads
    return layout_cast(lax.broadcast_in_dim(values, threads.shape, (1,)), threads.layout)


def load_channels(plan: Plan, ref: Any) -> Array:
    """A reference [channels] -> [channels]; `spread_channels` makes it [lanes, channels]."""
    return load(ref, plan.threads.layout.reduce(0))


def load_states(plan: Plan, ref: Any) -> Array:
    """A reference [lanes] -> [lanes, channels]."""
    threads = plan.threads
    values = load(ref, threads.layout.reduce(1))
    return layout_cast(lax.broadcast_in_dim(values, threads.shape, (0,)), threads.layout)


def fill(plan: Plan, value: float) -> Array:
    """[lanes, channels] of one value."""
    return layout_cast(jnp.full(plan.threads.shape, value, F32), plan.threads.layout)


def load_rows(plan: Plan, ref: Any, steps: int) -> Array:
    """A reference [steps, channels] -> float32, every element in one thread."""
    return load(ref, plan.threads.over_steps(steps)).astype(F32)


def load_parts(plan: Plan, ref: Any, m: int, steps: int) -> Array:
    """Partial sums of modality m, a reference [steps, M, lanes, channels + padding] -> [steps, channels]."""
    columns = pl.ds(0, plan.threads.channels)
    return total([load_rows(plan, ref.at[:, m, k, columns], steps) for k in range(plan.threads.lanes)])


def over_steps(plan: Plan, ref: Any, steps: int) -> Array:
    """A reference [channels] -> [steps, channels], the same at every step."""
    layout = plan.threads.over_steps(steps)
    shape = (steps, plan.threads.channels)
    return layout_cast(lax.broadcast_in_dim(load(ref, layout.reduce(0)), shape, (1,)), layout)


def over_channels(plan: Plan, ref: Any, steps: int) -> Array:
    """A reference [steps] -> [steps, channels], the same in every channel."""
    layout = plan.threads.over_steps(steps)
    shape = (steps, plan.threads.channels)
    return layout_cast(lax.broadcast_in_dim(load(ref, layout.reduce(1)), shape, (0,)), layout)


def convert_projections(plan: Plan, inp: Refs, scr: Refs, slot: Any, slab: Any, steps: int) -> None:
    """B and C of a slab as float32 [steps, 2 M, SLAB]; zero where masked, whatever they hold."""
    layout = projection_layout(steps)
    for m in range(plan.M):
        for row, name in ((2 * m, "B"), (2 * m + 1, "C")):
            if name not in inp:
                continue
            values = load(scr[name].at[slot, m, :, slab], layout).astype(F32)
            if plan.masked:
                present = load(scr["flags"].at[slot, :, m], layout.reduce(1))
                present = lax.broadcast_in_dim(present, values.shape, (0,))
                values = jnp.where(layout_cast(present, layout) > 0, values, jnp.zeros_like(values))
            store(scr["projections"].at[:, row], values)


def softplus(plan: Plan, values: Array) -> Array:
    """log(1 + exp(v)); to float32 accuracy for small results too where the inputs are float32."""
    e = jnp.exp(-jnp.abs(values))
    if plan.dtype == jnp.bfloat16:
        tail = jnp.log(1.0 + e)
    else:
        # The hardware's logarithm is exact to 2**-22 near 1 in absolute terms only: log(1 + e) = 2 atanh(e / (2 + e)).
        s = e / (2.0 + e)
        q = s * s
        series = 1 / 11
        for k in (9, 7, 5, 3, 1):
            series = series * q + 1 / k
        tail = 2.0 * s * series
    return jnp.maximum(values, 0.0) + tail


def sigmoid(plan: Plan, values: Array) -> Array:
    """One hardware operation instead of two (exp, reciprocal) where the inputs are bfloat16; it is exact to 2**-11."""
    if plan.dtype == jnp.bfloat16:
        return 0.5 + 0.5 * jnp.tanh(0.5 * values)
    return 1.0 / (1.0 + jnp.exp(-values))


def step_size(plan: Plan, raw: Array, bias: Array, present: Array | None) -> Array:
    """dt from what was given; exactly 0 where masked, which makes a = 1 and u = 0 there."""
    values = raw if present is None else jnp.where(present > 0, raw, jnp.zeros_like(raw))
    values = values + bias
    if plan.dt_softplus:
        values = softplus(plan, values)
    return values if present is None else jnp.where(present > 0, values, jnp.zeros_like(values))


def keep(present: Array | None, values: Array) -> Array:
    """Zeroes masked elements, whatever they hold."""
    return values if present is None else jnp.where(present > 0, values, jnp.zeros_like(values))


class Constants:
    """What the steps of one slab share: A * log2(e), log2 of the gains, and the weights of `full`.

    Attributes:
        A: for each modality a list of arrays [lanes, channels], see `plan.Threads`.
        gain: the same for log2 g, or None.
        weights: M x M scalars, or None.
    """

    def __init__(self, plan: Plan, inp: Refs, slab: Any, columns: Any):
        """Loads them from device memory."""
        self.plan = plan
        rows, layout = range(plan.threads.rows), plan.threads.layout
        self.A = [[load(inp["A"].at[m, slab, :, i, columns], layout) for i in rows] for m in range(plan.M)]
        self.gain = self.weights = None
        if plan.coupling == "shared":
            self.gain = [[load_states(plan, inp["gain"].at[m, slab, :, i]) for i in rows] for m in range(plan.M)]
        if plan.coupling == "full":
            self.weights = [[inp["weights"][m, j] for j in range(plan.M)] for m in range(plan.M)]

    def decay(self, m: int, i: int, dt: Array) -> Array:
        """g a = exp(dt A + log g), one multiply-add and one power of two."""
        exponent = dt * self.A[m][i]
        return jnp.exp2(exponent if self.gain is None else exponent + self.gain[m][i])

    def entering(self, m: int, i: int, state: State) -> Array:
        """What modality m reads of the states before a step: H, h^m or SUM_j W_mj h^j."""
        if self.plan.coupling == "shared":
            return state[0][i]
        if self.weights is None:
            return state[m][i]
        return total([self.weights[m][j] * state[j][i] for j in range(self.plan.M)])


def total(values: list[Array]) -> Array:
    """Sum of a list."""
    result = values[0]
    for value in values[1:]:
        result = result + value
    return result


def advance(plan: Plan, constants: Constants, state: State, now: list[tuple]) -> tuple[State, State]:
    """One step (Eq. 5, 6 and 9).

    Args:
        plan: the plan.
        constants: of the slab.
        state: entering the step.
        now: for each modality dt and u = dt x [lanes, channels] and the list of `rows` values of B.

    Returns:
        h^m of every modality, and the state after the step.
    """
    h, rows = [], range(plan.threads.rows)
    for m in range(plan.M):
        dt, u, B = now[m][:3]
        h.append([constants.decay(m, i, dt) * constants.entering(m, i, state) + u * B[i] for i in rows])
    if plan.coupling == "shared":
        return h, [[total([h[m][i] for m in range(plan.M)]) for i in rows]]
    return h, h


def map_state(function: Callable[..., Array], *states: State) -> State:
    """Applies a function to each array of states."""
    return [[function(*arrays) for arrays in zip(*chains, strict=True)] for chains in zip(*states, strict=True)]


def reset_state(plan: Plan, scr: Refs, slot: Any, t: Any, state: State) -> State:
    """The state entering step t: zero at a reset."""
    if not plan.resets:
        return state
    kept = scr["flags"][slot, t, plan.M + 1]
    return map_state(lambda h: h * kept, state)


def hold_state(plan: Plan, scr: Refs, slot: Any, t: Any, before: State, after: State) -> State:
    """The state after step t: untouched by gains and weights where nothing is observed."""
    if not plan.masked or plan.coupling == "independent":
        return after
    idle = scr["flags"][slot, t, plan.M]
    return map_state(lambda old, new: old * idle + new * (1.0 - idle), before, after)


def choose(condition: Any, yes: Array, no: Array) -> Array:
    """One of two arrays by a scalar."""
    return jnp.where(jnp.broadcast_to(condition, yes.shape), yes, no)


def add_slab(plan: Plan, ref: Any, value: Array, slab: Any) -> None:
    """Stores a slab's sum over its states on top of the sums of the slabs before it."""
    if plan.slabs > 1:
        old = load(ref, plan.threads.layout)
        value = value + choose(slab > 0, old, jnp.zeros_like(old))
    store(ref, value)


def sync() -> None:
    """Waits for the other warps of the block; what they wrote to shared memory can be read, and copied away."""
    plgpu.commit_smem()


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
            _store_vector(target, [_constant(k // 4), _thread(), _constant(0)], [_value(a) for a in arrays[k : k + 4]])

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
        _, arith, _, _ = _dialects()
        lane = arith.shrui(arith.andi(_thread(), _constant(31)), _constant((32 // threads.lanes).bit_length() - 1))
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
        _sum_over_lanes(target, [_value(a) for a in arrays], exact)

    sums(ref.reshape(4, 2, threads.lanes, threads.rows), *products)


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


def _value(array: Any) -> Any:
    """The one element that this thread has of an array [lanes, channels]."""
    return _element(array.registers.item(), 0)


def _store_vector(target: Any, position: list[Any], values: list[Any]) -> None:
    ir, _, _, vector = _dialects()
    row = vector.from_elements(ir.VectorType.get((len(values),), ir.F32Type.get()), values)
    vector.store(row, target, [_index(p) for p in position])


def _sum_over_lanes(target: Any, products: list[Any], exact: bool) -> None:
    ir, arith, llvm, _ = _dialects()
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    lane, warp = arith.andi(_thread(), _constant(31)), arith.shrui(_thread(), _constant(5))
    four, within = arith.shrui(lane, _constant(2)), arith.andi(lane, _constant(3))
    acc = [arith.constant(f32, 0.0)] * 4
    result_type = llvm.StructType.get_literal([f32] * 4)
    code = (
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )
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
            a = [arith.bitcast(i32, part[k]) for k in (0, 2, 1, 3)]
            constraints = "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f"
            out = llvm.inline_asm(result_type, [*a, *ones, *acc], code, constraints, has_side_effects=False)
            acc = [llvm.extractvalue(f32, out, [k]) for k in range(4)]
    # Lane l has arrays 4 (l % 4) to 4 (l % 4) + 3, summed over the lanes of l // 4: add the other groups of its warp.
    for distance in (4, 8):
        acc = [arith.addf(v, mgpu.utils.shfl_bfly(v, distance)) for v in acc]
    shared = arith.shrui(lane, _constant(4))
    first_row = arith.muli(arith.andi(within, _constant(1)), _constant(4))
    _store_vector(target, [warp, arith.shrui(within, _constant(1)), shared, first_row], acc)
