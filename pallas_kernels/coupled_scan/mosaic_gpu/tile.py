"""What the forward and the backward kernel do alike: loads, spreads, elementwise maths and one step of the recurrence.

Axes: M modality, N state, D channel; a state is `State`: for each of S chains a list of ROWS arrays [LANES, CHANNELS].
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._compat import layout_cast, load, store
from pallas_kernels.coupled_scan.mosaic_gpu.plan import (
    CHANNELS,
    F32,
    LANES,
    ROWS,
    STATE,
    Plan,
    projection_layout,
    rows_layout,
)

Array = jax.Array
Refs = dict[str, Any]
State = list[list[Array]]


def spread_channels(values: Array) -> Array:
    """[CHANNELS] -> [LANES, CHANNELS]."""
    return layout_cast(lax.broadcast_in_dim(values, (LANES, CHANNELS), (1,)), STATE)


def spread_states(values: Array) -> Array:
    """[LANES] -> [LANES, CHANNELS]."""
    return layout_cast(lax.broadcast_in_dim(values, (LANES, CHANNELS), (0,)), STATE)


def load_channels(ref: Any) -> Array:
    """A reference [CHANNELS] -> [LANES, CHANNELS]."""
    return spread_channels(load(ref, STATE.reduce(0)))


def load_states(ref: Any) -> Array:
    """A reference [LANES] -> [LANES, CHANNELS]."""
    return spread_states(load(ref, STATE.reduce(1)))


def load_rows(ref: Any, steps: int) -> Array:
    """A reference [steps, CHANNELS] -> float32, every element in one thread."""
    return load(ref, rows_layout(steps)).astype(F32)


def over_steps(ref: Any, steps: int) -> Array:
    """A reference [CHANNELS] -> [steps, CHANNELS], the same at every step."""
    layout = rows_layout(steps)
    return layout_cast(lax.broadcast_in_dim(load(ref, layout.reduce(0)), (steps, CHANNELS), (0 + 1,)), layout)


def over_channels(ref: Any, steps: int) -> Array:
    """A reference [steps] -> [steps, CHANNELS], the same in every channel."""
    layout = rows_layout(steps)
    return layout_cast(lax.broadcast_in_dim(load(ref, layout.reduce(1)), (steps, CHANNELS), (0,)), layout)


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


def load_projection(plan: Plan, ref: Any, i: int) -> Array:
    """Row i of one step's B or C, a reference [SLAB], before it is spread: [LANES]."""
    if plan.interpret:  # knows no reshaped references
        return ref[...].reshape(LANES, ROWS)[:, i]
    return load(ref.reshape(LANES, ROWS).at[:, i], STATE.reduce(1))


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
        A: for each modality a list of ROWS arrays [LANES, CHANNELS].
        gain: the same for log2 g, or None.
        weights: M x M scalars, or None.
    """

    def __init__(self, plan: Plan, inp: Refs, slab: Any, columns: Any):
        """Loads them from device memory."""
        self.plan = plan
        rows = range(ROWS)
        self.A = [[load(inp["A"].at[m, slab, i, :, columns], STATE) for i in rows] for m in range(plan.M)]
        self.gain = self.weights = None
        if plan.coupling == "shared":
            self.gain = [[load_states(inp["gain"].at[m, slab, i]) for i in rows] for m in range(plan.M)]
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
        now: for each modality dt and u = dt x [LANES, CHANNELS] and the list of ROWS values of B.

    Returns:
        h^m of every modality, and the state after the step.
    """
    h = []
    for m in range(plan.M):
        dt, u, B = now[m][:3]
        h.append([constants.decay(m, i, dt) * constants.entering(m, i, state) + u * B[i] for i in range(ROWS)])
    if plan.coupling == "shared":
        return h, [[total([h[m][i] for m in range(plan.M)]) for i in range(ROWS)]]
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
        old = load(ref, STATE)
        value = value + choose(slab > 0, old, jnp.zeros_like(old))
    store(ref, value)


def sync() -> None:
    """Waits for the other warps of the block; what they wrote to shared memory can be read, and copied away."""
    plgpu.commit_smem()


def save_thread(ref: Any, state: list[Array], interpret: Any) -> None:
    """Stores ROWS arrays [LANES, CHANNELS] so that each thread finds its own values again, [ROWS / 4, threads, 4]."""
    if interpret:
        ref[...] = jnp.stack(state).reshape(ROWS // 4, 4, -1).transpose(0, 2, 1)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *[STATE] * ROWS))
    def write(ctx: Any, target: Any, *arrays: Any) -> None:
        del ctx
        for k in range(0, ROWS, 4):
            _store_vector(target, [_constant(k // 4), _thread(), _constant(0)], [_value(a) for a in arrays[k : k + 4]])

    write(ref, *state)


def load_thread(ref: Any, interpret: Any) -> list[Array]:
    """The inverse of `save_thread`."""
    if interpret:
        values = ref[...].transpose(0, 2, 1).reshape(ROWS, LANES, CHANNELS)
        return [values[i] for i in range(ROWS)]
    like = plgpu.ShapeDtypeStruct((LANES, CHANNELS), F32, layout=STATE)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=[like] * ROWS)
    def read(ctx: Any, source: Any) -> list[Any]:
        del ctx
        ir, _, _, vector = _dialects()
        f32, one = ir.F32Type.get(), ir.VectorType.get((1,), ir.F32Type.get())
        layout, arrays = STATE.to_mgpu(), []
        for k in range(ROWS // 4):
            row = vector.load(
                ir.VectorType.get((4,), f32), source, [_index(v) for v in (_constant(k), _thread(), _constant(0))]
            )
            for j in range(4):
                registers = np.empty(layout.registers_shape((LANES, CHANNELS)), dtype=object)
                registers[...] = vector.broadcast(one, _element(row, j))
                arrays.append(mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None))
        return arrays

    return list(read(ref))


def sum_channels(products: list[Array], ref: Any, interpret: Any, exact: bool) -> None:
    """Sums 2 * ROWS arrays [LANES, CHANNELS] over the channels of each warp, into a reference [4, 2, SLAB].

    The tensor cores do most of it: a product of a matrix with ones adds four lanes, for four arrays in one
    instruction; by shuffles alone it would take 7.5 instructions for each array.

    Args:
        products: the arrays.
        ref: where the sums go; axis 0 counts the warps.
        interpret: whether the kernel is interpreted.
        exact: adds what the tensor cores cut off (13 of 24 bits) in a second pass.
    """
    if interpret:
        stacked = jnp.stack(products).reshape(2, ROWS, LANES, 4, CHANNELS // 4)
        ref[...] = jnp.transpose(jnp.sum(stacked, axis=4), (3, 0, 2, 1)).reshape(4, 2, -1)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *[STATE] * len(products)))
    def sums(ctx: Any, target: Any, *arrays: Any) -> None:
        del ctx
        _sum_over_lanes(target, [_value(a) for a in arrays], exact)

    sums(ref.reshape(4, 2, LANES, ROWS), *products)


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
    """The one element that this thread has of an array [LANES, CHANNELS]."""
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
