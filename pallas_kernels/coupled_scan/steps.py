"""The recurrence step by step, with its derivative written out: what `xla` does on a CPU, and for Full everywhere.

Channels are the last axis, so that a CPU's vector units work along them. The forward pass keeps the state entering
each step, nothing of the size of a decay; the backward pass computes the decays again.

Axes: T time, M modality, B batch, N state, D channel. A state is [B, N, D] for Shared, [M, B, N, D] otherwise.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.coupled_scan.types import Array, Readout
from pallas_kernels.coupled_scan.varying import vary, varying_axes
from pallas_kernels.platform import default_platform

Inputs = dict[str, Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def walk(readout: Readout, inputs: Inputs, state: Array) -> tuple[Array, Array]:
    """T steps.

    Args:
        readout: see `coupled_scan`.
        inputs: float32: "dt" and "u" (dt x) [T, M, B, D], "B" and "C" [T, M, B, N], "A" [M, N, D]; for Shared
            "log_gain" [M, N], for Full "weights" [M, M]; where there are masks "idle" [T, B], 1 where nothing is
            observed; where there are resets "kept" [T, B], 0 at a reset.
        state: entering the first step.

    Returns:
        What the modalities read, [T, M, B, D], and the state after the last step.
    """
    return _forward(readout, inputs, state)[0]


PARAMETERS = ("A", "log_gain", "weights")
LARGEST_GROUPS = 64
"""Gradients of parameters are summed over up to so many groups of samples apart, and over the groups after the last
step: where a batch is spread over so many devices, `jax.jit` sums over devices once and not at each step."""


def _forward(readout: Readout, inputs: Inputs, state: Array) -> tuple[tuple[Array, Array], tuple[Inputs, Array]]:
    parameters, sequences = _split(inputs)

    def step(state: Array, now: Inputs) -> tuple[Array, tuple[Array, Array]]:
        entering, source = _source(parameters, now, state)
        h = _decay(parameters, now) * source + _outer(now["B"], now["u"])
        after = _sum(h, axis=0) if "log_gain" in parameters else h
        if "idle" in now:
            after = jnp.where(_spread(now["idle"]) > 0, entering, after)
        read = _sum(h, axis=0) if readout == "shared" else h
        return after, (_sum(now["C"][..., None] * read, axis=2), state)

    final, (y, states) = jax.lax.scan(step, state, sequences)
    return (y, final), (inputs, states)


def _backward(readout: Readout, saved: tuple[Inputs, Array], bars: tuple[Array, Array]) -> tuple[Inputs, Array]:
    inputs, states = saved
    parameters, sequences = _split(inputs)
    shared = "log_gain" in parameters
    n_batch = inputs["dt"].shape[2]
    groups = math.gcd(n_batch, LARGEST_GROUPS)

    def grouped(values: Array) -> Array:
        """[M, B, N, D] -> [M, groups, N, D]."""
        return values.reshape(len(values), groups, n_batch // groups, *values.shape[2:]).sum(2)

    def step(carry: tuple[Array, Inputs], now: tuple[Inputs, Array, Array]) -> tuple[tuple[Array, Inputs], Inputs]:
        adjoint, sums = carry
        now, state, y_bar = now
        entering, source = _source(parameters, now, state)
        passed = None
        if "idle" in now:
            passed, adjoint = (adjoint * _spread(v) for v in (now["idle"], 1 - now["idle"]))
        decay = _decay(parameters, now)
        h = decay * source + _outer(now["B"], now["u"])
        h_bar = _outer(now["C"], y_bar)
        read = h
        if readout == "shared":
            h_bar, read = (jnp.broadcast_to(_sum(v, axis=0), h.shape) for v in (h_bar, h))
        h_bar = h_bar + adjoint
        source_bar = decay * h_bar
        exponent_bar = source_bar * source
        gradients = {
            "dt": _sum(exponent_bar * parameters["A"][:, None], axis=2),
            "u": _sum(h_bar * now["B"][..., None], axis=2),
            "B": jnp.einsum("mbnd,mbd->mbn", h_bar, now["u"], precision="highest"),
            "C": jnp.einsum("mbnd,mbd->mbn", read, y_bar, precision="highest"),
        }
        sums = sums | {"A": sums["A"] + grouped(exponent_bar * now["dt"][:, :, None])}
        if shared:
            sums["log_gain"] = sums["log_gain"] + grouped(exponent_bar)
            adjoint = _sum(source_bar, axis=0)
        elif "weights" in parameters:
            pieces = (v.reshape(len(v), groups, -1) for v in (source_bar, entering))
            products = jnp.einsum("mgk,igk->gmi", *pieces, precision="highest")
            sums["weights"] = sums["weights"] + products
            adjoint = _mix(parameters["weights"].T, source_bar)
        else:
            adjoint = source_bar
        adjoint = adjoint if passed is None else adjoint + passed
        return (adjoint * _spread(now["kept"]) if "kept" in now else adjoint, sums), gradients

    y_bar, final_bar = bars
    n_modalities, *rest = inputs["A"].shape
    shapes = dict.fromkeys(("A", "log_gain"), (n_modalities, groups, *rest))
    shapes["weights"] = (groups, n_modalities, n_modalities)
    zeros = {name: jnp.zeros(shapes[name], v.dtype) for name, v in parameters.items()}
    carry = vary((final_bar, zeros), varying_axes((inputs, states, bars)))
    (state_bar, sums), gradients = jax.lax.scan(step, carry, (sequences, states, y_bar), reverse=True)
    over = {"A": 1, "log_gain": (1, -1), "weights": 0}
    sums = {name: values.sum(over[name]) for name, values in sums.items()}
    switches = {name: jnp.zeros_like(v) for name, v in inputs.items() if name in ("idle", "kept")}
    return gradients | sums | switches, state_bar


walk.defvjp(_forward, _backward)


def _split(inputs: Inputs) -> tuple[Inputs, Inputs]:
    """Parameters, and what has steps."""
    parameters = {k: v for k, v in inputs.items() if k in PARAMETERS}
    return parameters, {k: v for k, v in inputs.items() if k not in PARAMETERS}


def _source(parameters: Inputs, now: Inputs, state: Array) -> tuple[Array, Array]:
    """The state that enters a step, and what the modalities read of it."""
    entering = state * _spread(now["kept"]) if "kept" in now else state
    return entering, _mix(parameters["weights"], entering) if "weights" in parameters else entering


def _decay(parameters: Inputs, now: Inputs) -> Array:
    """g a, [M, B, N, D]."""
    exponent = now["dt"][:, :, None] * parameters["A"][:, None]
    if "log_gain" in parameters:
        exponent = exponent + parameters["log_gain"][:, None, :, None]
    return jnp.exp(exponent)


def _outer(states: Array, channels: Array) -> Array:
    """[M, B, N] and [M, B, D] -> [M, B, N, D]."""
    return states[..., None] * channels[:, :, None]


def _spread(values: Array) -> Array:
    """[B] -> [B, 1, 1]."""
    return values[:, None, None]


def _sum(values: Array, axis: int) -> Array:
    """Sum over modalities or states.

    On CPUs XLA hands sums to the library YNNPACK, which takes up to ten times as long over these axes. It does not know
    this one: a sum that keeps what it has if that is not a number, which changes no result. Not for axes that may be
    spread over devices (batch, channels): XLA cannot make a sum over devices of it.
    """
    if default_platform() != "cpu":
        return jnp.sum(values, axis)
    zero = vary(jnp.zeros((), values.dtype), varying_axes(values))
    return jax.lax.reduce(values, zero, lambda a, b: jax.lax.select(a == a, a + b, a), (axis % values.ndim,))


def _mix(weights: Array, h: Array) -> Any:
    return jnp.einsum("mi,ibnd->mbnd", weights, h, precision="highest")
