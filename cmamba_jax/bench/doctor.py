"""`cmamba doctor`: what is installed, which devices there are, and whether the scan is right on them."""

import functools
import importlib.metadata
import platform

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import choose_implementation, coupled_scan, implementations
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
# Against the reference on the same device, relative L2: results, gradients.
_TOLERANCES = {"float32": (1e-5, 1e-4), "bfloat16": (1e-2, 2e-2)}


def examine() -> bool:
    """Prints versions and devices and checks results and gradients of each implementation against the reference.

    Every coupling, float32 and bfloat16, with masks, resets and states, on the default device.

    Returns:
        Whether every implementation that can run here is right.
    """
    print(f"Python {platform.python_version()}, " + ", ".join(_versions()))
    print("devices: " + ", ".join(f"{d.id} {d.device_kind} ({d.platform})" for d in jax.devices()))
    healthy = True
    for name, implementation in implementations().items():
        if name == "reference":
            continue
        for coupling in ("independent", "shared", "full"):
            for dtype, tolerances in _TOLERANCES.items():
                case = Case(**_SIZES, dtype=dtype, coupling=coupling, **_EVERYTHING)
                if why := implementation.unsupported(Problem(**make_inputs(case)), default_platform()):
                    verdict = f"not here: {why}"
                else:
                    errors = _compare(case, name)
                    right = all(e <= t for e, t in zip(errors, tolerances, strict=True))
                    healthy &= right
                    verdict = f"{'ok' if right else 'WRONG'}: results {errors[0]:.1e}, gradients {errors[1]:.1e}"
                print(f"{name:<12}{coupling:<13}{dtype:<10}{verdict}")
    choice = choose_implementation(Problem(**make_inputs(Case(**_SIZES))))
    print(f"used by default: {choice.name} ({choice.reason})")
    return healthy


def _versions() -> list[str]:
    found = []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _compare(case: Case, name: str) -> tuple[float, float]:
    """Largest relative L2 distance to the reference of the results, and of the gradients."""
    inputs = make_inputs(case)
    switches = {key: inputs.pop(key) for key in ("mask", "reset")}

    @functools.partial(jax.jit, static_argnames="implementation")
    def run(inputs: dict, implementation: str) -> tuple:
        def scan(inputs: dict) -> tuple:
            out = coupled_scan(**inputs, **switches, **case.options, implementation=implementation)
            return out.y, out.final_state

        out, vjp = jax.vjp(scan, inputs)
        return out, vjp(jax.tree.map(lambda v: jnp.cos(jnp.arange(v.size)).reshape(v.shape).astype(v.dtype), out))

    def distance(a: jax.Array, b: jax.Array) -> float:
        a, b = (np.asarray(v, np.float64) for v in (a, b))
        return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))

    pairs = zip(run(inputs, name), run(inputs, "reference"), strict=True)
    results, gradients = (max(jax.tree.leaves(jax.tree.map(distance, a, b))) for a, b in pairs)
    return results, gradients
