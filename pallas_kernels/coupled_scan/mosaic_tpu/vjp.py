"""From a problem to the kernels' arrays and back, with the derivative rule."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from pallas_kernels.coupled_scan.mosaic_tpu import backward, forward
from pallas_kernels.coupled_scan.mosaic_tpu.plan import LANES, LOG2E, Plan, make_flags, pad_last
from pallas_kernels.coupled_scan.types import Full, Problem, ScanOutput, Shared
from pallas_kernels.coupled_scan.varying import vary


def scan(interpret: Any, problem: Problem) -> ScanOutput:
    """Solves the problem with the forward kernel.

    Args:
        interpret: False to compile for a TPU; True or `pltpu.InterpretParams` to run anywhere, slowly.
        problem: the checked arguments.

    Returns:
        y and the final state.
    """
    return _scan(interpret, vary(problem))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(interpret: Any, problem: Problem) -> ScanOutput:
    return _forward(interpret, problem)[0]


def prepare(plan: Plan, p: Problem) -> dict[str, jax.Array]:
    """The arrays that the kernels read: those of the problem, parameters laid out with channels on the lanes.

    Decays are powers of two in the kernels (the hardware's), so A and log g are scaled by log2(e).
    """
    # Channels beyond D are zero up to the widest block.
    channels = -(-plan.D // forward.WIDTH) * forward.WIDTH

    def rows(values: jax.Array) -> jax.Array:
        return pad_last(values.astype(jnp.float32), channels)[:, None]

    def over_states(values: jax.Array) -> jax.Array:
        """Zero-pads [M, N, ...] to whole sublanes."""
        return jnp.pad(values, ((0, 0), (0, plan.states - plan.N), (0, 0)))

    arrays = {"x": p.x, "dt": p.dt, "B": p.B, "C": p.C}
    arrays["A"] = pad_last(over_states(p.A.astype(jnp.float32).swapaxes(1, 2) * LOG2E), channels)
    if isinstance(p.coupling, Shared):
        gain = p.coupling.log_gain.astype(jnp.float32)[..., None] * LOG2E
        arrays["log_gain"] = over_states(jnp.broadcast_to(gain, (*gain.shape[:2], LANES)))
    if isinstance(p.coupling, Full):
        arrays["weights"] = p.coupling.weights.astype(jnp.float32)
    if p.D is not None:
        arrays["D"] = rows(p.D)
    if p.dt_bias is not None:
        arrays["dt_bias"] = rows(p.dt_bias)
    if p.z is not None:
        arrays["z"] = p.z
    if p.initial_state is not None:
        arrays["initial_state"] = p.initial_state.reshape(plan.chains, plan.B, plan.D, plan.N)
    if (flags := make_flags(plan, p.mask, p.reset)) is not None:
        arrays["flags"] = flags
    return arrays


def _forward(interpret: Any, p: Problem) -> tuple[ScanOutput, tuple[Problem, jax.Array | None]]:
    plan = Plan.of(p, interpret)
    out = forward.run(plan, prepare(plan, p))
    final_state = out["final_state"].reshape(p.state_shape)
    return ScanOutput(y=out["y"], final_state=final_state), (p, out.get("boundaries"))


def _forward_rule(interpret: Any, p: Problem) -> tuple[ScanOutput, tuple[Problem, jax.Array | None]]:
    return _forward(interpret, jax.tree.map(lambda primal: primal.value, p))


def _backward_rule(interpret: Any, saved: tuple[Problem, jax.Array | None], bar: ScanOutput) -> tuple[Problem]:
    p, boundaries = saved
    plan = Plan.of(p, interpret)
    arrays = prepare(plan, p)
    arrays["y_bar"] = jnp.zeros(p.x.shape, p.x.dtype) if isinstance(bar.y, SymbolicZero) else bar.y
    if not isinstance(bar.final_state, SymbolicZero):
        arrays["final_bar"] = bar.final_state.reshape(plan.chains, plan.B, plan.D, plan.N)
    if boundaries is not None:
        arrays["boundaries"] = boundaries
    grads = backward.run(plan, arrays)

    def channels(values: jax.Array) -> jax.Array:
        """[G, M, ..., width] -> [M, ..., D]."""
        values = jnp.moveaxis(values, 0, -2)
        return values.reshape(*values.shape[:-2], -1)[..., : plan.D]

    def like(value: jax.Array, primal: jax.Array | None) -> jax.Array | None:
        return None if primal is None else value.astype(primal.dtype)

    coupling = p.coupling
    if isinstance(coupling, Shared):
        log_gain = grads["log_gain"].sum((0, 3))[:, : plan.N]
        coupling = Shared(like(log_gain, coupling.log_gain))
    if isinstance(coupling, Full):
        weights = grads["weights"].sum((0, 2, 3)).reshape(plan.M, plan.M)
        coupling = Full(like(weights, coupling.weights))
    return (
        Problem(
            x=grads["x"],
            dt=grads["dt"],
            A=like(channels(grads["A"].sum(0))[:, : plan.N].swapaxes(1, 2), p.A),
            B=grads["B"],
            C=grads["C"],
            coupling=coupling,
            D=None if p.D is None else like(channels(grads["D"].sum(0).sum(2)), p.D),
            z=grads.get("z"),
            dt_bias=None if p.dt_bias is None else like(channels(grads["dt_bias"].sum(0).sum(2)), p.dt_bias),
            mask=_no_gradient(p.mask),
            reset=_no_gradient(p.reset),
            initial_state=None if p.initial_state is None else grads["initial_state"].reshape(p.state_shape),
            dt_softplus=p.dt_softplus,
            readout=p.readout,
        ),
    )


def _no_gradient(values: jax.Array | None) -> np.ndarray | None:
    return None if values is None else np.zeros(values.shape, jax.dtypes.float0)


_scan.defvjp(_forward_rule, _backward_rule, symbolic_zeros=True)
