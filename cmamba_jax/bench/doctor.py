"""`cmamba doctor`: what is installed, which devices there are, and whether scan and convolution are right on them."""

import functools
import importlib.metadata
import platform
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import causal_conv, choose_implementation, coupled_scan, implementations
from pallas_kernels.coupled_scan.cases import Case, make_inputs
from pallas_kernels.coupled_scan.types import Problem
from pallas_kernels.platform import default_platform

_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "libtpu",
    "jax-cuda13-plugin",
    "jax-triton",
    "triton",
)
_EVERYTHING = dict.fromkeys(("skip", "gate", "dt_bias", "mask", "reset", "initial_state"), True)
_SIZES = {"M": 3, "B": 2, "L": 300, "D": 256, "N": 16}
# Relative L2: results, gradients.
_TOLERANCES = {"float32": (1e-5, 1e-4), "bfloat16": (1e-2, 2e-2)}


def examine() -> bool:
    """Prints versions and devices and checks results and gradients of each implementation on the default device.

    The scan against the reference: every coupling, float32 and bfloat16, with masks, resets and states. The
    convolution against XLA's in float32.

    Returns:
        Whether every implementation that can run here is right.
    """
    print(f"Python {platform.python_version()}, " + ", ".join(_versions()))
    print("devices: " + ", ".join(f"{d.id} {d.device_kind} ({d.platform})" for d in jax.devices()))
    scan, convolution = _examine_scan(), _examine_convolution()
    return scan and convolution


def _examine_scan() -> bool:
    healthy = True
    for name, implementation in implementations().items():
        if name == "reference":
            continue
        for coupling in ("independent", "shared", "full"):
            for dtype in _TOLERANCES:
                case = Case(**_SIZES, dtype=dtype, coupling=coupling, **_EVERYTHING)
                why = implementation.unsupported(Problem(**make_inputs(case)), default_platform())
                healthy &= _judge(f"{name:<12}{coupling}", dtype, why, functools.partial(_compare_scans, case, name))
    choice = choose_implementation(Problem(**make_inputs(Case(**_SIZES))))
    print(f"used by default: {choice.name} ({choice.reason})")
    return healthy


def _examine_convolution() -> bool:
    healthy = True
    for dtype in _TOLERANCES:
        arrays, mask = _draw_convolution(dtype)
        why = causal_conv.unsupported(default_platform(), *arrays, mask)
        compare = functools.partial(_compare_convolutions, arrays, mask)
        healthy &= _judge("mosaic_gpu  convolution", dtype, why, compare)
    print(f"convolution used by default: {causal_conv.choose_implementation(*arrays, mask)}")
    return healthy


def _judge(what: str, dtype: str, why_not: str | None, compare: Callable[[], tuple[float, float]]) -> bool:
    """Prints how far results and gradients are off, and returns whether that is little enough."""
    right, verdict = True, f"not here: {why_not}"
    if not why_not:
        errors = compare()
        right = all(e <= t for e, t in zip(errors, _TOLERANCES[dtype], strict=True))
        verdict = f"{'ok' if right else 'WRONG'}: results {errors[0]:.1e}, gradients {errors[1]:.1e}"
    print(f"{what:<25}{dtype:<10}{verdict}")
    return right


def _versions() -> list[str]:
    found = []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _compare_scans(case: Case, name: str) -> tuple[float, float]:
    """Largest relative L2 distance to the reference of the results, and of the gradients."""
    inputs = make_inputs(case)
    switches = {key: inputs.pop(key) for key in ("mask", "reset")}

    def scan(implementation: str, inputs: dict) -> tuple:
        out = coupled_scan(**inputs, **switches, **case.options, implementation=implementation)
        return out.y, out.final_state

    return _distances(*(_run(functools.partial(scan, which), inputs) for which in (name, "reference")))


def _draw_convolution(dtype: str) -> tuple[list[jax.Array], jax.Array]:
    """Arguments of `causal_conv.causal_conv_silu`."""
    (m, b, length, d), taps = (_SIZES[axis] for axis in "MBLD"), 4
    rng = np.random.default_rng(0)
    shapes = ((m, b, length, d), (m, taps, d), (m, d), (m, b, taps - 1, d))
    arrays = [jnp.asarray(rng.standard_normal(shape, np.float32), dtype) for shape in shapes]
    return arrays, jnp.asarray(rng.random((m, b, length)) < 0.8)


def _compare_convolutions(arrays: list[jax.Array], mask: jax.Array) -> tuple[float, float]:
    """Largest relative L2 distance of the kernels to XLA in float32 of the results, and of the gradients."""

    def convolve(implementation: str, arrays: list[jax.Array]) -> jax.Array:
        return causal_conv.causal_conv_silu(*arrays, mask, implementation=implementation)

    exact = [v.astype(jnp.float32) for v in arrays]
    return _distances(
        _run(functools.partial(convolve, "mosaic_gpu"), arrays), _run(functools.partial(convolve, "xla"), exact)
    )


def _run(function: Callable[[Any], Any], inputs: Any) -> tuple[Any, Any]:
    """The results of a function, and the gradients of its inputs for some gradient of the results."""

    @jax.jit
    def both(inputs: Any) -> tuple[Any, Any]:
        out, vjp = jax.vjp(function, inputs)
        return out, vjp(jax.tree.map(lambda v: jnp.cos(jnp.arange(v.size)).reshape(v.shape).astype(v.dtype), out))[0]

    return both(inputs)


def _distances(found: tuple[Any, Any], expected: tuple[Any, Any]) -> tuple[float, float]:
    """Largest relative L2 distance of the results, and of the gradients."""

    def distance(a: jax.Array, b: jax.Array) -> float:
        a, b = (np.asarray(v, np.float64) for v in (a, b))
        return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))

    results, gradients = (
        max(jax.tree.leaves(jax.tree.map(distance, a, b))) for a, b in zip(found, expected, strict=True)
    )
    return results, gradients
