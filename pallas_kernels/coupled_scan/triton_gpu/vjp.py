"""From a problem to the kernels' arrays and back, with the derivative rule."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import _compat
from pallas_kernels.coupled_scan.triton_gpu import kernels
from pallas_kernels.coupled_scan.types import Array, Full, Problem, ScanOutput, Shared

F32 = jnp.float32
SEGMENT = 16
"""Steps between two saved states."""
Call = Callable[..., dict[str, Array]]


def call_on_gpu(
    kernel: Any,
    arrays: tuple[Array, ...],
    outputs: Mapping[str, jax.ShapeDtypeStruct],
    *,
    grid: tuple[int, int],
    warps: int,
    constants: Mapping[str, Any],
    compute_capability: int | None = None,
) -> dict[str, Array]:
    """Runs a kernel through jax-triton.

    Args:
        kernel: a Triton function of the arrays, the outputs and the constants.
        arrays: what it reads.
        outputs: what it writes, in the kernel's order.
        grid: how many programs.
        warps: of a program.
        constants: its compile-time arguments.
        compute_capability: 80 for 8.0; None: that of the device.

    Returns:
        The outputs by name.
    """
    results = _compat.triton_call(
        *arrays,
        kernel=kernel,
        out=tuple(outputs.values()),
        grid=grid,
        name=f"coupled_scan_{kernel.__name__}",
        num_warps=warps,
        compute_capability=compute_capability,
        **constants,
    )
    return dict(zip(outputs, results, strict=True))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan(call: Call, p: Problem) -> ScanOutput:
    """Solves a problem; see `triton_gpu.scan`."""
    return _forward(call, p, save=False)[0]


def tiling(m: int, d: int, n: int, *, full: bool) -> tuple[dict[str, int], int]:
    """Sizes of a program's tiles, and its warps: 16 states a thread, fewer where registers would not hold them."""
    p2m, p2n = _power_of_two(m), _power_of_two(n)
    warps = 4 if p2m * p2n <= 64 else 8
    states = 32 * warps * (4 if full else 8 if p2m * p2n > 64 else 16)
    channels = max(1, min(states // (p2m * p2n), 64, _power_of_two(d)))
    return {"P2M": p2m, "P2N": p2n, "BD": channels}, warps


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def prepare(p: Problem) -> tuple[tuple[Array, ...], dict[str, Any]]:
    """What both kernels read, in their order, and `call`'s other arguments."""
    m, b, length, d = p.x.shape
    n = p.A.shape[-1]
    kind = {Shared: 1, Full: 2}.get(type(p.coupling), 0)
    none = jnp.zeros((1,), F32)
    flagged = p.mask is not None or p.reset is not None
    bias = jnp.zeros((m, d), F32) if p.dt_bias is None else p.dt_bias
    parameter = next(iter(jax.tree.leaves(p.coupling)), none)
    optional = [none if v is None else v for v in (p.D, p.z)]
    flags = _flags(p) if flagged else none
    arrays = (p.x, p.dt, p.A, p.B, p.C, parameter, *optional, bias, flags)
    tiles, warps = tiling(m, d, n, full=kind == 2)
    constants = {"M": m, "B": b, "L": length, "D": d, "N": n, **tiles, "SEGMENT": SEGMENT, "KIND": kind}
    constants |= {"SHARED_READOUT": p.readout == "shared", "SOFTPLUS": p.dt_softplus}
    constants |= {"SKIP": p.D is not None, "GATE": p.z is not None, "FLAGS": flagged}
    return arrays, {"grid": (b, -(-d // tiles["BD"])), "warps": warps, "constants": constants}


def _flags(p: Problem) -> Array:
    """float32 [B, L, M + 2], see kernels.py."""
    m, b, length, _ = p.x.shape
    present = jnp.ones((m, b, length), bool) if p.mask is None else p.mask
    kept = jnp.ones((b, length), bool) if p.reset is None else ~p.reset
    rows = jnp.concatenate([present, ~jnp.any(present, axis=0, keepdims=True), kept[None]])
    return jnp.moveaxis(rows, 0, 2).astype(F32)


def _chains(p: Problem) -> int:
    return 1 if isinstance(p.coupling, Shared) else p.x.shape[0]


def _forward(call: Call, p: Problem, *, save: bool) -> tuple[ScanOutput, Array]:
    arrays, launch = prepare(p)
    _, b, length, d = p.x.shape
    state = jnp.zeros(p.state_shape, F32) if p.initial_state is None else p.initial_state
    saved = (-(-length // SEGMENT), _chains(p), b, p.A.shape[-1], d) if save else (1,)
    outputs = {
        "y": jax.ShapeDtypeStruct(p.x.shape, p.x.dtype),
        "final": jax.ShapeDtypeStruct(p.state_shape, F32),
        "saved": jax.ShapeDtypeStruct(saved, F32),
    }
    launch["constants"] |= {"SAVE": save}
    out = call(kernels.forward, (*arrays, state), outputs, **launch)
    return ScanOutput(y=out["y"], final_state=out["final"]), out["saved"]


def _forward_rule(call: Call, p: Problem) -> tuple[ScanOutput, tuple[Problem, Array]]:
    out, saved = _forward(call, p, save=True)
    return out, (p, saved)


def _backward_rule(call: Call, kept: tuple[Problem, Array], bar: ScanOutput) -> tuple[Problem]:
    p, saved = kept
    arrays, launch = prepare(p)
    m, b, length, d = p.x.shape
    n, blocks = p.A.shape[-1], launch["grid"][1]

    def f32(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, F32)

    parameter = {Shared: (m, n), Full: (m, m)}.get(type(p.coupling), ())
    outputs = {
        "x": jax.ShapeDtypeStruct(p.x.shape, p.x.dtype),
        "dt": jax.ShapeDtypeStruct(p.dt.shape, p.dt.dtype),
        "z": f32(1) if p.z is None else jax.ShapeDtypeStruct(p.z.shape, p.z.dtype),
        "B": f32(blocks, m, b, length, n),
        "C": f32(blocks, m, b, length, n),
        "A": f32(b, m, d, n),
        "parameter": f32(blocks, b, *parameter),
        "D": f32(b, m, d),
        "dt_bias": f32(b, m, d),
        "initial_state": f32(*p.state_shape),
        "entering": f32(min(SEGMENT, length), _chains(p), b, n, d),
    }
    out = call(kernels.backward, (*arrays, saved, bar.y, bar.final_state), outputs, **launch)

    def like(value: Array | None, gradient: Array) -> Array | None:
        return None if value is None else gradient.astype(value.dtype)

    coupling = jax.tree.map(lambda v: like(v, jnp.sum(out["parameter"], axis=(0, 1))), p.coupling)
    gradient = Problem(
        x=out["x"],
        dt=out["dt"],
        A=like(p.A, jnp.sum(out["A"], axis=0)),
        B=like(p.B, jnp.sum(out["B"], axis=0)),
        C=like(p.C, jnp.sum(out["C"], axis=0)),
        coupling=coupling,
        D=like(p.D, jnp.sum(out["D"], axis=0)),
        z=like(p.z, out["z"]),
        dt_bias=like(p.dt_bias, jnp.sum(out["dt_bias"], axis=0)),
        mask=_no_gradient(p.mask),
        reset=_no_gradient(p.reset),
        initial_state=like(p.initial_state, out["initial_state"]),
        dt_softplus=p.dt_softplus,
        readout=p.readout,
    )
    return (gradient,)


def _no_gradient(values: Array | None) -> Any:
    return None if values is None else np.zeros(values.shape, jax.dtypes.float0)


scan.defvjp(_forward_rule, _backward_rule)
