"""The public functions: check the arguments, pick an implementation, run it."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp

from pallas_kernels.coupled_scan import mosaic_gpu, mosaic_tpu, reference, trace, triton_gpu, xla
from pallas_kernels.coupled_scan.types import (
    Array,
    Coupling,
    Full,
    Independent,
    Problem,
    Readout,
    ScanInputError,
    ScanOutput,
    Shared,
    UnsupportedError,
)
from pallas_kernels.platform import default_platform


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute the scan.

    Attributes:
        name: what `coupled_scan(implementation=...)` takes.
        summary: what it is and supports, one line.
        run: solves a problem.
        unsupported: why it cannot solve a problem on a platform ("cpu", "gpu", "tpu"), or None if it can.
        knows_varying: whether it runs inside `jax.shard_map` with its checks of varying axes, the default.
    """

    name: str
    summary: str
    run: Callable[[Problem], ScanOutput]
    unsupported: Callable[[Problem, str], str | None]
    knows_varying: bool = True


@dataclasses.dataclass(frozen=True)
class Choice:
    """The implementation that `implementation=None` takes, and why."""

    name: str
    reason: str


def _everything(problem: Problem, platform: str) -> str | None:
    del problem, platform
    return None


_IMPLEMENTATIONS = (
    Implementation(
        "reference",
        "lax.scan, one step at a time: every coupling, dtype, shape and device; slow",
        reference.scan,
        _everything,
    ),
    Implementation(
        "xla",
        "in time chunks (associative scans, on CPUs step by step), of little memory: all couplings, dtypes and devices",
        xla.scan,
        _everything,
    ),
    Implementation(
        "mosaic_gpu",
        "Pallas kernels for NVIDIA GPUs from Hopper on: every coupling, float32 and bfloat16, M up to 8, N up to 128",
        mosaic_gpu.scan,
        mosaic_gpu.unsupported,
        knows_varying=False,
    ),
    Implementation(
        "mosaic_tpu",
        "Pallas kernels for TPUs: every coupling, float32 and bfloat16, M up to 8, N up to 128; never run on a TPU yet",
        mosaic_tpu.scan,
        mosaic_tpu.unsupported,
    ),
    Implementation(
        "triton",
        "Triton kernels for NVIDIA GPUs from Ampere on: every coupling, M up to 8, N up to 128; not tuned",
        triton_gpu.scan,
        triton_gpu.unsupported,
        knows_varying=False,
    ),
)


def implementations() -> dict[str, Implementation]:
    """All implementations by name."""
    return {i.name: i for i in _IMPLEMENTATIONS}


def choose_implementation(problem: Problem, platform: str | None = None) -> Choice:
    """Picks the fastest implementation that is tested for the platform, dtype and shape.

    Args:
        problem: arrays or `jax.ShapeDtypeStruct`s.
        platform: "cpu", "gpu" or "tpu"; None: that of the default device.

    Returns:
        The name and the reason.
    """
    platform = platform or default_platform()
    if platform == "tpu":
        if why := mosaic_tpu.unsupported(problem, platform):
            return Choice("xla", f"mosaic_tpu cannot: {why}; the chunked scan runs everywhere")
        return Choice("mosaic_tpu", "the Pallas kernels for TPUs")
    if platform == "gpu":
        if why := mosaic_gpu.unsupported(problem, platform):
            return Choice("xla", f"mosaic_gpu cannot: {why}; the chunked scan runs everywhere")
        return Choice("mosaic_gpu", "the Pallas kernels for GPUs, tested on an H100")
    return Choice("xla", f"there is no kernel for {platform}; the chunked scan runs everywhere")


def coupled_scan(
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    *,
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
    """Coupled selective scan over M modalities (Li et al. 2024, Eq. 5, 6, 8 and 9).

    With a_t^m = exp(dt_t^m A^m) and u_t^m = dt_t^m x_t^m B_t^m the states follow the `coupling`, then
    y_t^m = (SUM_n C_t^m h_t^m + D^m x_t^m) * SiLU(z_t^m). States, decays and sums are float32 whatever the inputs are.

    Args:
        x: inputs, [M, B, L, D], float32 or bfloat16.
        dt: step sizes before bias and softplus, [M, B, L, D].
        A: state matrix (diagonal), negative, [M, D, N].
        B: input projection, [M, B, L, N].
        C: output projection, [M, B, L, N].
        coupling: `Independent()`, `Shared(log_gain)` or `Full(weights)`, used as given.
        D: skip connection, [M, D].
        z: gate before SiLU, [M, B, L, D].
        dt_bias: added to dt, [M, D].
        dt_softplus: whether the step size is softplus(dt + dt_bias); else dt + dt_bias, which has to be >= 0.
        mask: bool [M, B, L]; False (missing modality, padding) makes dt = 0 and y = 0 there, whatever the inputs
            hold. A step at which every modality is masked leaves the state exactly as it was.
        reset: bool [B, L]; True makes the state entering the step zero (packed sequences).
        initial_state: float [B, D, N] for Shared, else [M, B, D, N]; None: zeros.
        reverse: process time backwards; masks and resets act in the direction of processing.
        readout: "per_modality", y^m = C^m h^m (Algorithm 1), or "shared", y^m = C^m SUM_i h^i (Eq. 8).
        implementation: a name of `implementations()`; None: see `choose_implementation`.

    Returns:
        y [M, B, L, D] in x's dtype and the final state in float32. Both are differentiable in every float argument.

    Raises:
        ScanInputError: an argument has the wrong shape, dtype or value.
        UnsupportedError: the named implementation is unknown or cannot solve this problem here.

    Example:
        >>> import jax.numpy as jnp
        >>> from pallas_kernels import Shared, coupled_scan
        >>> M, B, L, D, N = 2, 1, 5, 3, 4
        >>> ones = jnp.ones
        >>> coupling = Shared(log_gain=jnp.full((M, N), -jnp.log(M)))
        >>> out = coupled_scan(ones((M, B, L, D)), ones((M, B, L, D)), -ones((M, D, N)), ones((M, B, L, N)),
        ...                    ones((M, B, L, N)), coupling=coupling)
        >>> out.y.shape, out.final_state.shape
        ((2, 1, 5, 3), (1, 3, 4))
    """
    problem = Problem(
        x=x,
        dt=dt,
        A=A,
        B=B,
        C=C,
        coupling=coupling,
        D=D,
        z=z,
        dt_bias=dt_bias,
        mask=mask,
        reset=reset,
        initial_state=initial_state,
        dt_softplus=dt_softplus,
        readout=readout,
    )
    _check(problem)
    name = implementation or choose_implementation(problem).name
    known = implementations()
    if name not in known:
        raise UnsupportedError(f"unknown scan implementation {name!r}; known: {', '.join(known)} (None picks one)")
    if why := known[name].unsupported(problem, default_platform()):
        raise UnsupportedError(f"scan implementation {name!r} cannot be used here: {why}; use implementation='xla'")

    if initial_state is not None:
        problem = dataclasses.replace(problem, initial_state=initial_state.astype(jnp.float32))
    if reverse:
        problem = _turn(problem)
    trace.record(problem)
    out = known[name].run(problem)
    return dataclasses.replace(out, y=jnp.flip(out.y, 2)) if reverse else out


def coupled_scan_step(
    state: Array,
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    *,
    coupling: Coupling,
    D: Array | None = None,
    z: Array | None = None,
    dt_bias: Array | None = None,
    dt_softplus: bool = True,
    mask: Array | None = None,
    reset: Array | None = None,
    readout: Readout = "per_modality",
) -> ScanOutput:
    """Advances a coupled scan by one step; L calls equal one `coupled_scan` over L steps.

    Args:
        state: [B, D, N] for Shared, else [M, B, D, N]; zeros to start.
        x: [M, B, D]; dt and z likewise.
        dt: [M, B, D].
        A: [M, D, N].
        B: [M, B, N].
        C: [M, B, N].
        coupling: as in `coupled_scan`, like D, dt_bias, dt_softplus and readout.
        D: [M, D].
        z: [M, B, D].
        dt_bias: [M, D].
        dt_softplus: as in `coupled_scan`.
        mask: bool [M, B].
        reset: bool [B].
        readout: as in `coupled_scan`.

    Returns:
        y [M, B, D] and the state after the step, float32.
    """

    def one(values: Array | None, axis: int) -> Array | None:
        return None if values is None else jnp.expand_dims(values, axis)

    out = coupled_scan(
        one(x, 2),
        one(dt, 2),
        A,
        one(B, 2),
        one(C, 2),
        coupling=coupling,
        D=D,
        z=one(z, 2),
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        mask=one(mask, 2),
        reset=one(reset, 1),
        initial_state=state,
        readout=readout,
        implementation="reference",
    )
    return ScanOutput(y=out.y[:, :, 0], final_state=out.final_state)


def _turn(p: Problem) -> Problem:
    """The same problem with time running the other way."""

    def flip(values: Array | None, axis: int) -> Array | None:
        return None if values is None else jnp.flip(values, axis)

    return dataclasses.replace(
        p,
        x=flip(p.x, 2),
        dt=flip(p.dt, 2),
        B=flip(p.B, 2),
        C=flip(p.C, 2),
        z=flip(p.z, 2),
        mask=flip(p.mask, 2),
        reset=flip(p.reset, 1),
    )


def _check(p: Problem) -> None:
    """Raises ScanInputError for the first argument that does not fit."""
    if not isinstance(p.coupling, Independent | Shared | Full):
        raise ScanInputError(f"coupling: expected Independent, Shared or Full, got {type(p.coupling).__name__}")
    if p.readout not in ("per_modality", "shared"):
        raise ScanInputError(f"readout: expected 'per_modality' or 'shared', got {p.readout!r}")
    for name, value, rank in (("x", p.x, 4), ("A", p.A, 3)):
        if len(getattr(value, "shape", ())) != rank or 0 in value.shape:
            axes = "[M, B, L, D]" if name == "x" else "[M, D, N]"
            raise ScanInputError(f"{name}: expected {axes} without empty axes, got {getattr(value, 'shape', value)}")
    m, b, length, d = p.x.shape
    n = p.A.shape[-1]
    sizes = f"M={m}, B={b}, L={length}, D={d} (from x), N={n} (from A)"
    arguments = [
        ("dt", p.dt, (m, b, length, d)),
        ("A", p.A, (m, d, n)),
        ("B", p.B, (m, b, length, n)),
        ("C", p.C, (m, b, length, n)),
        ("D", p.D, (m, d)),
        ("z", p.z, (m, b, length, d)),
        ("dt_bias", p.dt_bias, (m, d)),
        ("initial_state", p.initial_state, p.state_shape),
        ("mask", p.mask, (m, b, length)),
        ("reset", p.reset, (b, length)),
    ]
    if isinstance(p.coupling, Shared):
        arguments.append(("coupling.log_gain", p.coupling.log_gain, (m, n)))
    if isinstance(p.coupling, Full):
        arguments.append(("coupling.weights", p.coupling.weights, (m, m)))
    for name, value, shape in arguments:
        if value is None:
            continue
        if not hasattr(value, "shape") or tuple(value.shape) != shape:
            raise ScanInputError(f"{name}: expected shape {shape}, got {getattr(value, 'shape', value)}; {sizes}")
        if name in ("mask", "reset"):
            if value.dtype != jnp.bool_:
                raise ScanInputError(f"{name}: expected bool (True = present / restart), got {value.dtype}")
        elif not jnp.issubdtype(value.dtype, jnp.floating):
            raise ScanInputError(f"{name}: expected a floating dtype, got {value.dtype}")
    if not jnp.issubdtype(p.x.dtype, jnp.floating):
        raise ScanInputError(f"x: expected a floating dtype, got {p.x.dtype}")
