"""From a problem to the kernels' arrays and back, and the derivative rule."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.coupled_scan.mosaic_gpu import channel_sums, chunks, forward, forward_tensor, segments
from pallas_kernels.coupled_scan.mosaic_gpu.plan import F32, LOG2E, SLAB, Plan, pad_axis
from pallas_kernels.coupled_scan.types import Full, Problem, ScanOutput, Shared

Array = jax.Array
ALIGNED = 8
"""Channels are padded to a multiple: 16 bytes of the narrowest type, which copies to shared memory need."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan(interpret: Any, p: Problem) -> ScanOutput:
    """Solves a problem; see `mosaic_gpu.scan`."""
    return _forward(interpret, p, save=False)[0]


def _forward(interpret: Any, p: Problem, *, save: bool) -> tuple[ScanOutput, dict[str, Array]]:
    plan, arrays = prepare(interpret, p)
    plan = plan.forward()
    chunk = plan.chunk_steps(plan.save)
    arrays["state"] = chunks.entering(plan, arrays, chunk)
    run = forward_tensor.run if plan.threads.tensor else forward.run
    out = run(plan, arrays, chunk, plan.save if save else None)
    final = unpack_state(p, out["final"])
    y = out["y"][:, :, : plan.L, : p.x.shape[-1]].astype(p.x.dtype)
    return ScanOutput(y=y, final_state=final), {k: out[k] for k in out if k == "saved"}


def _forward_rule(interpret: Any, p: Problem) -> tuple[ScanOutput, tuple[Problem, dict[str, Array]]]:
    out, kept = _forward(interpret, p, save=True)
    return out, (p, kept)


def _backward_rule(interpret: Any, kept: tuple[Problem, dict[str, Array]], bar: ScanOutput) -> tuple[Problem]:
    p, saved = kept
    plan, arrays = prepare(interpret, p)
    chunk = plan.chunk_steps(plan.save)
    del arrays["state"]
    arrays["dy"] = pad_axis(bar.y.astype(plan.dtype), 3, plan.D)
    final = pack_state(plan, p, bar.final_state.astype(F32))
    arrays["adjoint"] = chunks.adjoint(plan, arrays, final, chunk)
    plan = plan.backward()
    return (gradients(plan, p, segments.run(plan, arrays | saved, chunk)),)


scan.defvjp(_forward_rule, _backward_rule)


def prepare(interpret: Any, p: Problem) -> tuple[Plan, dict[str, Array]]:
    """The plan and the arrays of the kernels.

    Returns:
        The plan, its D a multiple of ALIGNED, and: x, dt, z [M, B, L, D]; B, C [M, B, L, slabs, SLAB]; flags
        [B, L, F] if needed; with the channels padded to D', whole blocks, A [M, slabs, SLAB, D'] (times log2(e)),
        dt_bias and skip [M, D'], state [S, B, slabs, SLAB, D']; gain [M, slabs, SLAB] (log2 g) or weights [M, M].
    """
    d = -(-p.x.shape[-1] // ALIGNED) * ALIGNED
    plan = dataclasses.replace(Plan.of(p, interpret), D=d)
    padded, states = plan.padded, plan.slabs * SLAB

    def large(values: Array) -> Array:
        return pad_axis(values.astype(plan.dtype), 3, d)

    def projection(values: Array) -> Array:
        values = pad_axis(values.astype(plan.dtype), 3, states)
        return values.reshape(*values.shape[:3], plan.slabs, SLAB)

    def row(values: Array | None) -> Array:
        values = jnp.zeros((plan.M, p.x.shape[-1]), F32) if values is None else values.astype(F32)
        return pad_axis(values, 1, padded)

    arrays = {"x": large(p.x), "dt": large(p.dt)}
    if p.z is not None:
        arrays["z"] = large(p.z)
    arrays |= {"B": projection(p.B), "C": projection(p.C), "dt_bias": row(p.dt_bias)}
    arrays["A"] = pack_states(pad_axis(p.A.astype(F32) * LOG2E, 1, padded), states)
    if plan.skip:
        arrays["skip"] = row(p.D)
    if isinstance(p.coupling, Shared):
        # States that only fill a slab up have gain zero: the product of SUM_m g_m = M over many steps would overflow.
        missing = jnp.full((plan.M, states - p.A.shape[-1]), -1000.0, F32)
        gain = jnp.concatenate([p.coupling.log_gain.astype(F32) * LOG2E, missing], axis=1)
        arrays["gain"] = gain.reshape(plan.M, plan.slabs, SLAB)
    if isinstance(p.coupling, Full):
        arrays["weights"] = p.coupling.weights.astype(F32)
    if plan.flagged:
        arrays["flags"] = make_flags(plan, p.mask, p.reset)
    zeros = jnp.zeros((plan.S, plan.B, plan.slabs, SLAB, padded), F32)
    arrays["state"] = zeros if p.initial_state is None else pack_state(plan, p, p.initial_state)
    return plan, arrays


def make_flags(plan: Plan, mask: Array | None, reset: Array | None) -> Array:
    """float32 [B, L, F]: M flags of presence, whether no modality is present, whether the state is kept, zeros."""
    shape = (plan.M, plan.B, plan.L)
    present = jnp.ones(shape, bool) if mask is None else mask
    kept = jnp.ones(shape[1:], bool) if reset is None else ~reset
    rows = jnp.concatenate([present, ~jnp.any(present, axis=0, keepdims=True), kept[None]])
    return pad_axis(jnp.moveaxis(rows, 0, 2).astype(F32), 2, plan.flags)


def pack_states(values: Array, states: int) -> Array:
    """[..., D, N] -> [..., slabs, SLAB, D]."""
    values = jnp.swapaxes(pad_axis(values, values.ndim - 1, states), -1, -2)
    return values.reshape(*values.shape[:-2], states // SLAB, SLAB, values.shape[-1])


def unpack_states(values: Array, d: int, n: int) -> Array:
    """The inverse: [..., slabs, SLAB, D'] -> [..., D, N]."""
    values = values.reshape(*values.shape[:-3], -1, values.shape[-1])
    return jnp.swapaxes(values, -1, -2)[..., :d, :n]


def pack_state(plan: Plan, p: Problem, state: Array) -> Array:
    """A state as the API has it -> [S, B, slabs, SLAB, D']."""
    state = state if state.ndim == 4 else state[None]
    return pack_states(pad_axis(state, 2, plan.padded), plan.slabs * SLAB)


def unpack_state(p: Problem, state: Array) -> Array:
    """The inverse of `pack_state`."""
    state = unpack_states(state, p.x.shape[-1], p.A.shape[-1])
    return state[0] if isinstance(p.coupling, Shared) else state


def gradients(plan: Plan, p: Problem, out: dict[str, Array]) -> Problem:
    """What the backward kernel returns -> the gradient of every argument, in the argument's shape and dtype."""
    d, n = p.x.shape[-1], p.A.shape[-1]

    def like(value: Array | None, gradient: Array) -> Array | None:
        return None if value is None else gradient.astype(value.dtype)

    projections = {k: out[k].reshape(*out[k].shape[:-2], -1)[..., : plan.L, :n] for k in ("dB", "dC")}
    rows = jnp.sum(out["drows"], axis=(0, 1, 4))[..., :d]
    coupling = p.coupling
    if isinstance(coupling, Shared):
        if "dgain_parts" in out:
            gain = channel_sums.sum_states(jnp.sum(out["dgain_parts"], axis=(0, 1, 2)))[..., :n]
        else:
            gain = jnp.sum(unpack_states(jnp.sum(out["dgain"], axis=(0, 1)), d, n), axis=1)
        coupling = Shared(gain.astype(coupling.log_gain.dtype))
    if isinstance(coupling, Full):
        coupling = Full(jnp.sum(out["dweights"], axis=(0, 1, 4, 5)).astype(coupling.weights.dtype))
    return Problem(
        x=like(p.x, out["dx"][:, :, : plan.L, :d]),
        dt=like(p.dt, out["ddt"][:, :, : plan.L, :d]),
        A=like(p.A, unpack_states(jnp.sum(out["dA"], axis=(0, 1)), d, n)),
        B=like(p.B, projections["dB"]),
        C=like(p.C, projections["dC"]),
        coupling=coupling,
        D=like(p.D, rows[0]),
        z=None if p.z is None else like(p.z, out["dz"][:, :, : plan.L, :d]),
        dt_bias=like(p.dt_bias, rows[1]),
        mask=None if p.mask is None else _no_gradient(p.mask),
        reset=None if p.reset is None else _no_gradient(p.reset),
        initial_state=like(p.initial_state, unpack_state(p, out["dstate"][0])),
        dt_softplus=p.dt_softplus,
        readout=p.readout,
    )


def _no_gradient(values: Array) -> Any:
    return np.zeros(values.shape, jax.dtypes.float0)
