"""What the forward and the backward kernel do alike: loads, spreads, elementwise maths and one step of the recurrence.

Axes: M modality, N state, D channel; a state is `State`: for each of S chains a list of arrays [lanes, channels] (see
`plan.Threads`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._compat import is_interpreted, layout_cast, load, store
from pallas_kernels.coupled_scan.mosaic_gpu import warp
from pallas_kernels.coupled_scan.mosaic_gpu.plan import F32, FACTOR_LAYOUT, FACTORS, SLAB, Plan, projection_layout

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
    return warp.widen(load(ref, plan.threads.over_steps(steps)), plan.threads.over_steps(steps))


def load_parts(plan: Plan, ref: Any, m: int, steps: int) -> Array:
    """Partial sums of modality m, a reference [steps, M, lanes, channels + padding] -> [steps, channels]."""
    columns = pl.ds(0, plan.threads.channels)
    return total([load_rows(plan, ref.at[:, m, k, columns], steps) for k in range(plan.threads.lanes)])


def over_steps(plan: Plan, ref: Any, steps: int) -> Array:
    """A reference [channels] -> [steps, channels], the same at every step."""
    layout = plan.threads.over_steps(steps)
    shape = (steps, plan.threads.channels)
    return layout_cast(lax.broadcast_in_dim(load(ref, layout.reduce(0)), shape, (1,)), layout)


def load_parameters(plan: Plan, inp: Refs, name: str, columns: Any, steps: int) -> list[Array]:
    """dt_bias or the skip of every modality, [steps, channels]."""
    return [over_steps(plan, inp[name].at[m, columns], steps) for m in range(plan.M)]


def over_channels(plan: Plan, ref: Any, steps: int) -> Array:
    """A reference [steps] -> [steps, channels], the same in every channel."""
    layout = plan.threads.over_steps(steps)
    shape = (steps, plan.threads.channels)
    return layout_cast(lax.broadcast_in_dim(load(ref, layout.reduce(1)), shape, (0,)), layout)


def convert_projections(plan: Plan, inp: Refs, scr: Refs, slot: Any, slab: Any, steps: int, *, C: bool = True) -> None:
    """B and, if asked for, C of a slab as float32 [steps, 2, M, SLAB]; zero where masked, whatever they hold.

    With C also SUM_n B_n C_n of the slab, [steps, M], where there is room for "BC".
    """
    layout = projection_layout(steps)
    names = [(k, name) for k, name in enumerate("BC" if C else "B") if name in inp]
    results = []
    for m in range(plan.M):
        values = [load(scr[name].at[slot, m, :, slab], layout).astype(F32) for _, name in names]
        if plan.masked:
            present = load(scr["flags"].at[slot, :, m], layout.reduce(1))
            present = layout_cast(lax.broadcast_in_dim(present, values[0].shape, (0,)), layout)
            values = [jnp.where(present > 0, v, jnp.zeros_like(v)) for v in values]
        results.append(values)
    both = [jnp.sum(v[0] * v[1], axis=1) for v in results] if C and "BC" in scr else []
    # Loads and sums come first: the compiler would not move them up past the stores.
    for m, values in enumerate(results):
        for (k, _), value in zip(names, values, strict=True):
            store(scr["projections"].at[:, k, m], value)
    for m, value in enumerate(both):
        store(scr["BC"].at[:, m], value)


def clear_factors(plan: Plan, scr: Refs, steps: int) -> None:
    """Zeroes the factors of the modalities that only the tensor cores see."""
    channels = plan.threads.channels
    for m in range(plan.M, FACTORS):
        zeros = layout_cast(jnp.zeros((steps, channels), F32), plan.threads.over_steps(steps))
        for name in ("u", "ybar"):
            if name in scr:
                store(scr[name].at[:, m, pl.ds(0, channels)], zeros)
        zeros = layout_cast(jnp.zeros((steps, SLAB), F32), projection_layout(steps))
        for k in range(2):
            store(scr["projections"].at[:, k, m], zeros)


def load_dt(plan: Plan, scr: Refs, t: Any) -> list[Array]:
    """dt of every modality at step t of a tile, before it is spread."""
    t = jnp.clip(t, 0, scr["step"].shape[0] - 1)
    return [load_channels(plan, scr["step"].at[t, m]) for m in range(plan.M)]


def load_factors(plan: Plan, scr: Refs, t: Any, name: str = "u", k: int = 0) -> tuple[Array, Array]:
    """u and B of step t of a tile as the tensor cores take them, or what is called `name` and projection k."""
    threads, t = plan.threads, jnp.clip(t, 0, scr[name].shape[0] - 1)
    u = load(scr[name].at[t, :, pl.ds(0, threads.channels)], threads.layout)
    return u, load(scr["projections"].at[t, k], FACTOR_LAYOUT)


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


def sigmoid(dtype: Any, values: Array) -> Array:
    """One hardware operation instead of two (exp, reciprocal) where the inputs are bfloat16; it is exact to 2**-11."""
    if dtype == jnp.bfloat16:
        return 0.5 + 0.5 * jnp.tanh(0.5 * values)
    return 1.0 / (1.0 + jnp.exp(-values))


def silu(dtype: Any, values: Array) -> Array:
    """values * sigmoid(values)."""
    if dtype == jnp.bfloat16:
        half = 0.5 * values
        return half * jnp.tanh(half) + half
    return values * sigmoid(dtype, values)


def softplus_slope(dt: Array) -> Array:
    """The derivative of softplus where it is dt; of small steps `sigmoid` in bfloat16 knows little."""
    return 1.0 - jnp.exp(-dt)


def step_size(plan: Plan, raw: Array, bias: Array, present: Array | None) -> Array:
    """dt from what was given; exactly 0 where masked, which makes a = 1 and u = 0 there."""
    values = raw if present is None else jnp.where(present > 0, raw, jnp.zeros_like(raw))
    values = values + bias
    if plan.dt_softplus:
        values = softplus(plan, values)
    return values if present is None else jnp.where(present > 0, values, jnp.zeros_like(values))


def round_factor(plan: Plan, values: Array) -> Array:
    """What the tensor cores, which cut off 13 bits, see without bias."""
    if not plan.threads.tensor or plan.interpret:
        return values
    bits = lax.bitcast_convert_type(values, jnp.int32)
    return lax.bitcast_convert_type(bits + 4096, F32)


def keep(present: Array | None, values: Array) -> Array:
    """Zeroes masked elements, whatever they hold."""
    return values if present is None else jnp.where(present > 0, values, jnp.zeros_like(values))


def load_ybar(plan: Plan, scr: Refs, slot: Any, m: int, steps: int, here: Array | None) -> Array:
    """The gradient of y before the gate, [steps, channels]; `here`: where it is present."""
    ybar = keep(here, load_rows(plan, scr["dy"].at[slot, m], steps))
    if not plan.gate:
        return ybar
    z = keep(here, load_rows(plan, scr["z"].at[slot, m], steps))
    return ybar * silu(plan.dtype, z)


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

    def decays(self, dt: list[Array]) -> State:
        """g a of every modality, whose dt is not spread yet."""
        dt = [spread_channels(self.plan, v) for v in dt]
        return [[self.decay(m, i, v) for i in range(self.plan.threads.rows)] for m, v in enumerate(dt)]

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
    """Waits for the other warps of the warpgroup; what they wrote to shared memory can be read."""
    if is_interpreted():
        plgpu.commit_smem()
    else:
        warp.barrier()


def commit() -> None:
    """`sync`, and what was written can be copied to device memory; waits for outstanding loads and stores as well."""
    plgpu.commit_smem()
