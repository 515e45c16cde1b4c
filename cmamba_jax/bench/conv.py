"""`cmamba bench conv`: the causal depthwise convolution and SiLU before the scan, as a kernel or as XLA compiles them.

They are bound by memory, so that their time is set against copying what they have to read and write once.
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from cmamba_jax.bench import peers, timing
from cmamba_jax.models import functional
from cmamba_jax.results import records
from pallas_kernels.causal_conv import choose_implementation
from pallas_kernels.coupled_scan.cases import BENCHMARKS, Case

TAPS = 4
"""Of the paper's model."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Time the convolution with SiLU against the time that its bytes take, forward and forward + backward."""

    shapes: tuple[str, ...] = ("S1", "S2", "S3", "S4")
    """Sizes of `cmamba bench scan --device-table`."""
    repeats: int = 20
    """Timed runs of about 0.1 s each; the median counts."""
    output: pathlib.Path = pathlib.Path("runs/bench")
    """Folder for conv.json."""
    json: bool = False
    """Print one JSON object instead of a table."""


def main(args: list[str]) -> None:
    """Runs `cmamba bench conv`.

    Args:
        args: words after ``conv``.
    """
    options = tyro.cli(Options, args=args, prog="cmamba bench conv")
    bandwidth = timing.copy_bandwidth()
    results = [
        {"shape": name, "implementation": implementation} | measured
        for name in options.shapes
        for implementation, measured in measure(BENCHMARKS[name], bandwidth, options.repeats).items()
    ]
    record = records.describe("conv", ["bench", "conv", *args]) | {
        "bandwidth_bytes_per_second": bandwidth,
        "repeats": options.repeats,
        "results": results,
    }
    records.save(record, options.output)
    if options.json:
        print(json.dumps(record, indent=2))
        return
    print(f"{record['device']}: copies {bandwidth / 1e12:.2f} TB/s; ms, and the share of it that the bytes would take")
    for result in results:
        cells = (f"{kind} {result[kind]['ms']:8.3f} {result[kind]['share']:5.0%}" for kind in KINDS)
        print(f"{result['shape']:<6} {result['implementation']:<10}", "   ".join(cells))


KINDS = ("forward", "forward_backward")


def measure(case: Case, bandwidth: float, repeats: int) -> dict[str, dict[str, Any]]:
    """Times of one size.

    Args:
        case: M, B, L, D and dtype.
        bandwidth: bytes a second of a copy.
        repeats: timed runs.

    Returns:
        For the implementation that is chosen here and for XLA's: "case", and for each of `KINDS` "ms" and "share": the
        time that reading x and writing y takes (backward: reading x and the gradient of y, writing that of x), divided
        by it.
    """
    keys = jax.random.split(jax.random.key(0), 4)
    shape, dtype = (case.M, case.B, case.L, case.D), jnp.dtype(case.dtype)
    x, bar = (jax.random.normal(key, shape, dtype) for key in keys[:2])
    kernel = jax.random.normal(keys[2], (case.M, TAPS, case.D))
    bias = jax.random.normal(keys[3], (case.M, case.D))
    window = jnp.zeros((case.M, case.B, TAPS - 1, case.D), dtype)

    def forward(implementation: str, x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
        return functional.causal_conv_silu(x, None, kernel, bias, window, None, implementation=implementation)[0]

    def forward_backward(implementation: str, x: jax.Array, kernel: jax.Array, bias: jax.Array) -> Any:
        y, vjp = jax.vjp(functools.partial(forward, implementation), x, kernel, bias)
        return y, vjp(bar)

    results: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys((choose_implementation(x, kernel, bias, window), "xla")):
        results[name] = {"case": {axis: getattr(case, axis) for axis in ("M", "B", "L", "D", "dtype")}}
        for kind, function, arrays in zip(KINDS, (forward, forward_backward), (2, 5), strict=True):
            run = peers.repeated(jax.jit(functools.partial(function, name)), x, kernel, bias)
            ms = 1e3 * timing.median_seconds(run, repeats=repeats)
            results[name][kind] = {"ms": ms, "share": 1e3 * arrays * x.nbytes / bandwidth / ms}
    return results
