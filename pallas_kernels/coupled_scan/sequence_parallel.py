"""The coupled scan of sequences whose time axis is cut over the devices of a mesh axis; used inside `jax.shard_map`.

A device holds consecutive steps. What happens to the state there is affine, final = P initial + e, with P the product
of the transitions and e the end state from zero. So, with P devices:

1. every device finds P and e of its own steps;
2. an exact prefix over the devices (ceil(log2 P) exchanges of neighbours at distances 1, 2, 4, ...) gives each the
   state that enters its first step;
3. every device runs `coupled_scan` from there.

Backwards the adjoint does the same in the other direction with P transposed: one run of the local derivative for the
adjoint that leaves a device, the prefix, one run with the adjoint that enters it. P needs no gradient, because the
states that the local scans start from are exact, so it is cheap: Independent has exp(A SUM dt), Shared the product of
its ONE chain's decays, a single fused reduction over dt; Full has M x M matrices, their columns are scans of unit
states without inputs.

Work of a device: two local scans forwards, two derivatives backwards. Exchanged: states, [B, D, N] (Shared),
[M, B, D, N] (Independent) or M + 1 times that (Full); nothing that grows with L.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.coupled_scan import discretize
from pallas_kernels.coupled_scan.api import coupled_scan
from pallas_kernels.coupled_scan.types import (
    Array,
    Coupling,
    Full,
    Independent,
    Problem,
    Readout,
    ScanInputError,
    ScanOutput,
)
from pallas_kernels.coupled_scan.varying import vary


@dataclasses.dataclass(frozen=True)
class _Static:
    """What is no array."""

    axis: str
    reverse: bool
    implementation: str | None


def sequence_parallel_scan(
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    *,
    axis_name: str,
    coupling: Coupling,
    D: Array | None = None,
    z: Array | None = None,
    dt_bias: Array | None = None,
    dt_softplus: bool = True,
    mask: Array | None = None,
    reset: Array | None = None,
    initial_state: Array | None = None,
    reverse: bool = False,
    readout: Readout = "per_modality",
    implementation: str | None = None,
) -> ScanOutput:
    """`coupled_scan` of a sequence that is cut into equal parts along a mesh axis (Eq. 5, 6, 8 and 9).

    To be called inside `jax.shard_map` (with its checks of varying axes, the default), each device with its own
    steps, in the order of the axis. Results and gradients are those of the scan of the whole sequence.

    Args:
        x: this device's steps, [M, B, L / devices, D]; dt, B, C, z, mask and reset likewise.
        dt: as in `coupled_scan`, like all that follow.
        A: [M, D, N], the same on all devices of the axis, like coupling, D, dt_bias and initial_state.
        B: [M, B, L / devices, N].
        C: [M, B, L / devices, N].
        axis_name: the mesh axis that time is cut along.
        coupling: `Independent()`, `Shared(log_gain)` or `Full(weights)`.
        D: [M, D].
        z: [M, B, L / devices, D].
        dt_bias: [M, D].
        dt_softplus: as in `coupled_scan`.
        mask: bool [M, B, L / devices].
        reset: bool [B, L / devices].
        initial_state: the state before the whole sequence.
        reverse: process time backwards, from the last device to the first.
        readout: as in `coupled_scan`.
        implementation: of the local scans, as in `coupled_scan`.

    Returns:
        y of this device's steps, and the final state of the whole sequence, the same on all devices of the axis.

    Raises:
        ScanInputError: an argument does not fit.
        UnsupportedError: the named implementation cannot solve the local problem.
    """
    problem = Problem(
        x, dt, A, B, C, coupling, D, z, dt_bias, mask, reset, initial_state, dt_softplus=dt_softplus, readout=readout
    )
    if len(getattr(x, "shape", ())) != 4 or len(getattr(A, "shape", ())) != 3:
        raise ScanInputError(
            f"expected x [M, B, L / devices, D] and A [M, D, N], got {getattr(x, 'shape', x)}, {getattr(A, 'shape', A)}"
        )
    if initial_state is None:
        initial_state = jnp.zeros(problem.state_shape, jnp.float32)
    problem = dataclasses.replace(problem, initial_state=initial_state.astype(jnp.float32))
    out = _scan(_Static(axis_name, reverse, implementation), vary(problem, [axis_name]))
    last = rank_of(axis_name, reverse) == jax.lax.axis_size(axis_name) - 1
    return ScanOutput(y=out.y, final_state=jax.lax.psum(jnp.where(last, out.final_state, 0), axis_name))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(static: _Static, problem: Problem) -> ScanOutput:
    return _local(static, dataclasses.replace(problem, initial_state=_entering(static, problem)[0]))


def _scan_forward(static: _Static, problem: Problem) -> tuple[ScanOutput, Any]:
    state, transition = _entering(static, problem)
    floats, switches = _split(dataclasses.replace(problem, initial_state=state))
    out, vjp = jax.vjp(lambda floats: _local(static, dataclasses.replace(floats, **switches)), floats)
    return out, (vjp, transition, switches)


def _scan_backward(static: _Static, saved: Any, bar: ScanOutput) -> tuple[Problem]:
    vjp, transition, switches = saved
    rank, size = rank_of(static.axis, static.reverse), jax.lax.axis_size(static.axis)
    # `bar.final_state` is that of the whole sequence on the last device, and zero on all others.
    leaving = vjp(bar)[0].initial_state
    arriving = shift(static.axis, -1, static.reverse, _prefix(static, _transpose(transition), leaving, backwards=True))
    final_bar = jnp.where(rank == size - 1, bar.final_state, arriving)
    # The second derivative starts after the first: what XLA makes of the inputs for one is not kept for the other.
    vjp, final_bar = jax.lax.optimization_barrier((vjp, final_bar))
    grads = vjp(ScanOutput(y=bar.y, final_state=final_bar))[0]
    initial_bar = jnp.where(rank == 0, grads.initial_state, 0)
    no_gradient = {
        name: None if values is None else np.zeros(values.shape, jax.dtypes.float0) for name, values in switches.items()
    }
    return (dataclasses.replace(grads, initial_state=initial_bar, **no_gradient),)


_scan.defvjp(_scan_forward, _scan_backward)


def _split(problem: Problem) -> tuple[Problem, dict[str, Array | None]]:
    """The differentiable part of a problem, and its masks."""
    switches = {"mask": problem.mask, "reset": problem.reset}
    return dataclasses.replace(problem, mask=None, reset=None), switches


def _local(static: _Static, problem: Problem) -> ScanOutput:
    """The scan of this device's steps."""
    arguments = {field.name: getattr(problem, field.name) for field in dataclasses.fields(problem)}
    return coupled_scan(**arguments, reverse=static.reverse, implementation=static.implementation)


def _entering(static: _Static, p: Problem) -> tuple[Array, Array]:
    """The state that enters this device's first step, and the product of its transitions."""
    rank = rank_of(static.axis, static.reverse)
    first = jnp.where(rank == 0, p.initial_state, 0)
    end = _local(static, dataclasses.replace(p, initial_state=first)).final_state
    transition = _transition(static, p)
    before = shift(static.axis, 1, static.reverse, _prefix(static, transition, end))
    return jnp.where(rank == 0, p.initial_state, before), transition


def _transition(static: _Static, p: Problem) -> Array:
    """The product P of the transitions of this device's steps: [B, D, N], [M, B, D, N] or, Full, [M, M, B, D, N]."""
    if isinstance(p.coupling, Full):
        quiet = dataclasses.replace(p, x=jnp.zeros_like(p.x), D=None, z=None, readout="per_modality")

        def column(unit: Array) -> Array:
            state = jnp.broadcast_to(unit[:, None, None, None], p.state_shape)
            return _local(static, vary(dataclasses.replace(quiet, initial_state=state))).final_state

        return jnp.moveaxis(jax.lax.map(column, jnp.eye(p.x.shape[0], dtype=jnp.float32)), 0, 1)

    bias = None if p.dt_bias is None else p.dt_bias[:, None, None, :]
    A = p.A.astype(jnp.float32)
    if isinstance(p.coupling, Independent):
        dt = discretize.step_size(p.dt, bias, p.mask, softplus=p.dt_softplus)
        product = jnp.exp(jnp.sum(dt, axis=2)[..., None] * A[:, None])
        return product if p.reset is None else jnp.where(jnp.any(p.reset, axis=1)[:, None, None], 0, product)
    log_gain = p.coupling.log_gain.astype(jnp.float32)

    def product(dt: Array, mask: Array | None, reset: Array | None) -> Array:
        """Of the steps given, [N, B, D]; the sum over modalities written out, so that it fuses into the product."""
        dt = discretize.step_size(dt, bias, mask, softplus=p.dt_softplus)  # [M, B, T, D]
        decay = sum(
            jnp.exp(dt[m][None] * A[m].T[:, None, None] + log_gain[m][:, None, None, None]) for m in range(dt.shape[0])
        )  # [N, B, T, D]
        if mask is not None:
            decay = jnp.where(jnp.any(mask, axis=0)[..., None], decay, 1)
        if reset is not None:
            decay = jnp.where(reset[..., None], 0, decay)
        return jnp.prod(decay, axis=2)

    # A compiler that does not fuse it keeps [N, B, T, D]: a number of chunks makes that a fraction of dt.
    m, _, length, _ = p.dt.shape
    steps = max(1, length * m // (8 * A.shape[-1]))

    def part(start: Array | int, size: int) -> Array:
        def cut(values: Array | None, axis: int) -> Array | None:
            return None if values is None else jax.lax.dynamic_slice_in_dim(values, start, size, axis)

        return product(cut(p.dt, 2), cut(p.mask, 2), cut(p.reset, 1))

    count, rest = divmod(length, steps)
    if rest:
        total = part(count * steps, rest)
    else:
        _, total = vary((p, jnp.ones((A.shape[-1], p.dt.shape[1], A.shape[1]), jnp.float32)))
    total = jax.lax.fori_loop(0, count, lambda i, total: total * part(i * steps, steps), total)
    return jnp.moveaxis(total, 0, -1)


def _prefix(static: _Static, transition: Array, end: Array, *, backwards: bool = False) -> Array:
    """The end states after all devices up to this one (backwards: from this one on), by recursive doubling."""
    sign = -1 if backwards else 1
    size = jax.lax.axis_size(static.axis)
    rank = rank_of(static.axis, static.reverse)
    rank = size - 1 - rank if backwards else rank
    distance = 1
    while distance < size:
        send = functools.partial(shift, static.axis, sign * distance, static.reverse)
        end = _apply(transition, send(end)) + end  # those without a sender receive zeros
        if 2 * distance < size:
            transition = jnp.where(rank >= distance, _compose(transition, send(transition)), transition)
        distance *= 2
    return end


def rank_of(axis: str, reverse: bool) -> Array:
    """Place of this device in the order of processing."""
    index = jax.lax.axis_index(axis)
    return jax.lax.axis_size(axis) - 1 - index if reverse else index


def shift(axis: str, distance: int, reverse: bool, values: Array) -> Array:
    """The values of the device `distance` places before this one in the order of processing; zeros without one."""
    size = jax.lax.axis_size(axis)
    step = -distance if reverse else distance
    return jax.lax.ppermute(values, axis, [(i, i + step) for i in range(size) if 0 <= i + step < size])


def _einsum(subscripts: str) -> Callable[..., Array]:
    return functools.partial(jnp.einsum, subscripts, precision="highest")


def _apply(transition: Array, state: Array) -> Array:
    if transition.ndim == state.ndim:
        return transition * state
    return _einsum("mibdn,ibdn->mbdn")(transition, state)


def _compose(late: Array, early: Array) -> Array:
    return late * early if late.ndim < 5 else _einsum("mibdn,ijbdn->mjbdn")(late, early)


def _transpose(transition: Array) -> Array:
    return transition if transition.ndim < 5 else jnp.swapaxes(transition, 0, 1)
