"""`cmamba bench scan`: time and memory of the coupled scan against the plain way to write it.

The baseline, `plain`, is `jax.lax.associative_scan` over the whole sequence, differentiated by JAX.
"""

import dataclasses
import functools
import json
import pathlib
import re
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro
from tqdm import tqdm

from cmamba_jax.errors import UserError
from cmamba_jax.results import records
from pallas_kernels import Coupling, Full, ScanOutput, Shared, coupled_scan, implementations
from pallas_kernels.coupled_scan import xla
from pallas_kernels.coupled_scan.cases import BENCHMARKS, make_inputs
from pallas_kernels.coupled_scan.types import Problem


@dataclasses.dataclass(frozen=True)
class Options:
    """Time and peak temporary memory of the coupled scan, forward and forward + backward."""

    case: Literal["cpu", "S1", "S2", "S3", "S4"] = "cpu"
    """Shape and dtype to start from; the options below override it."""
    modalities: int | None = None
    batch: int | None = None
    length: int | None = None
    channels: int | None = None
    states: int | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    coupling: Literal["independent", "shared", "full"] = "shared"
    variants: tuple[str, ...] = ("plain", "reference", "xla")
    """What to measure: plain (the baseline) or names of implementations; xla:32 is xla with chunks of 32 steps."""
    repeats: int = 5
    """Timed runs of each variant; the variants take turns."""
    json: bool = False
    """Print one JSON object instead of a table."""
    device_table: bool = False
    """On an accelerator: all shapes against the device's limits, and against other projects' scans if installed."""
    shapes: tuple[Literal["S1", "S2", "S3", "S4"], ...] = ("S1", "S2", "S3", "S4")
    """Shapes of the device table."""
    sweep: bool = False
    """Also sweep L and B in the device table."""
    peers: tuple[str, ...] = ("installed",)
    """Rows of the device table beside ours: mamba_ssm, jax-linear-attention, xla; "installed": all that are there."""
    output: pathlib.Path = pathlib.Path("runs/bench")
    """Folder for scan.json, or for device_table.json and device_table.png."""


def main(args: list[str]) -> None:
    """Runs `cmamba bench scan`.

    Args:
        args: words after ``scan``.
    """
    options = tyro.cli(Options, args=args, prog="cmamba bench scan")
    if options.device_table:
        from cmamba_jax.bench import device_table, peers

        names = peers.available() if options.peers == ("installed",) else options.peers
        known = (*peers.RUNNERS, *implementations())
        if unknown := [name for name in names if name not in known]:
            raise UserError(f"peers: unknown {unknown[0]!r}; known: {', '.join(known)}")
        rows = ("chosen", *names)
        head: dict[str, Any] = records.describe("device_table", ["bench", "scan", *args])
        head["name"] = "_".join([*options.shapes, *["sweep"] * options.sweep])
        print(device_table.run(options.shapes, options.sweep, rows, options.output, options.repeats, head))
        return
    result = records.describe("scan", ["bench", "scan", *args]) | measure(options)
    records.save(result, options.output)
    print(json.dumps(result, indent=2) if options.json else _table(result))


def measure(options: Options) -> dict[str, Any]:
    """Measures every variant on one case.

    Returns:
        "case", "repeats" and "results": for each variant its "name" and, for
        "forward" and "forward_backward", the median "..._ms" and the peak temporary memory "..._temp_bytes".

    Raises:
        UserError: an unknown variant.
    """
    sizes = {"M": options.modalities, "B": options.batch, "L": options.length}
    sizes |= {"D": options.channels, "N": options.states}
    changes = {name: value for name, value in (sizes | {"dtype": options.dtype}).items() if value is not None}
    case = dataclasses.replace(BENCHMARKS[options.case], coupling=options.coupling, **changes)
    scans = {name: _variant(name) for name in options.variants}
    return {
        "case": dataclasses.asdict(case),
        "repeats": options.repeats,
        "results": _measure(scans, make_inputs(case), options.repeats),
    }


_Pair = tuple[jax.Array, jax.Array]
_Scan = Callable[..., ScanOutput]


def plain_scan(
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    *,
    coupling: Coupling,
    D: jax.Array,
    z: jax.Array,
    dt_bias: jax.Array,
) -> ScanOutput:
    """The coupled scan as one `jax.lax.associative_scan` over whole arrays [M, B, L, D, N].

    Args:
        x: [M, B, L, D]; dt and z likewise.
        dt: before bias and softplus.
        A: [M, D, N].
        B: [M, B, L, N].
        C: [M, B, L, N].
        coupling: as in `pallas_kernels.coupled_scan`.
        D: [M, D].
        z: before SiLU.
        dt_bias: [M, D].

    Returns:
        y and the final state.
    """
    x32, B32, C32 = (v.astype(jnp.float32) for v in (x, B, C))
    dt = jax.nn.softplus(dt.astype(jnp.float32) + dt_bias[:, None, None])
    a = jnp.exp(dt[..., None] * A[:, None, None])
    u = (dt * x32)[..., None] * B32[..., None, :]

    def one(early: _Pair, late: _Pair) -> _Pair:
        return late[0] * early[0], late[0] * early[1] + late[1]

    def matrices(early: _Pair, late: _Pair) -> _Pair:
        product = jnp.einsum("lmibdn,lijbdn->lmjbdn", late[0], early[0])
        return product, jnp.einsum("lmibdn,libdn->lmbdn", late[0], early[1]) + late[1]

    if isinstance(coupling, Shared):
        a = a * jnp.exp(coupling.log_gain)[:, None, None, None]
        _, total = jax.lax.associative_scan(one, (a.sum(0), u.sum(0)), axis=1)
        before = jnp.pad(total[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0)))
        h, final_state = a * before + u, total[:, -1]
    elif isinstance(coupling, Full):
        a, u = jnp.moveaxis(a, 2, 0), jnp.moveaxis(u, 2, 0)
        a = a[:, :, None] * coupling.weights[:, :, None, None, None]
        _, h = jax.lax.associative_scan(matrices, (a, u))
        h, final_state = jnp.moveaxis(h, 0, 2), h[-1]
    else:
        _, h = jax.lax.associative_scan(one, (a, u), axis=2)
        final_state = h[:, :, -1]
    y = jnp.einsum("mbldn,mbln->mbld", h, C32) + D[:, None, None] * x32
    return ScanOutput(y=(y * jax.nn.silu(z.astype(jnp.float32))).astype(x.dtype), final_state=final_state)


def _variant(name: str) -> _Scan:
    """The scan that a variant stands for."""
    if name == "plain":
        return plain_scan
    if name in implementations():
        return functools.partial(coupled_scan, implementation=name)
    if chunk := re.fullmatch(r"xla:([1-9]\d*)", name):
        return lambda **inputs: xla.scan(Problem(**inputs), chunk=int(chunk[1]))
    known = ", ".join(["plain", *implementations()])
    raise UserError(f"unknown variant {name!r}; known: {known}, or xla:CHUNK, e.g. xla:32")


def _measure(scans: dict[str, _Scan], inputs: dict[str, Any], repeats: int) -> list[dict[str, Any]]:
    """One record a variant. The variants take turns, so that a busy machine slows all of them alike."""

    def weighted_sum(scan: _Scan, inputs: dict[str, Any]) -> jax.Array:
        out = scan(**inputs)
        return jnp.sum(out.y.astype(jnp.float32) ** 2) + jnp.sum(out.final_state**2)

    runs, records = {}, {name: {"name": name} for name in scans}
    for name, scan in scans.items():
        forward = jax.jit(lambda inputs, scan=scan: scan(**inputs))
        forward_backward = jax.jit(jax.grad(functools.partial(weighted_sum, scan)))
        for kind, function in (("forward", forward), ("forward_backward", forward_backward)):
            runs[name, kind] = function.lower(inputs).compile()
            records[name][f"{kind}_temp_bytes"] = runs[name, kind].memory_analysis().temp_size_in_bytes
            jax.block_until_ready(runs[name, kind](inputs))

    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for _ in tqdm(range(repeats), desc="timing", leave=False):
        for key, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run(inputs))
            seconds[key].append(time.perf_counter() - start)
    for (name, kind), times in seconds.items():
        records[name][f"{kind}_ms"] = 1e3 * statistics.median(times)
    return list(records.values())


def _table(report: dict[str, Any]) -> str:
    case = report["case"]
    sizes = ", ".join(f"{axis} {case[axis]}" for axis in "MBLDN")
    lines = [
        f"{report['device']}, {report['versions']}",
        f"{case['coupling']} coupling, {sizes}, {case['dtype']}; medians of {report['repeats']} runs",
        "",
        f"{'':12}{'forward':>22}{'forward + backward':>26}",
        f"{'variant':12}{'ms':>10}{'temp MiB':>12}{'ms':>14}{'temp MiB':>12}",
    ]
    for record in report["results"]:
        columns = [record["forward_ms"], record["forward_temp_bytes"] / 2**20]
        columns += [record["forward_backward_ms"], record["forward_backward_temp_bytes"] / 2**20]
        lines.append(
            f"{record['name']:12}" + "".join(f"{v:>{w}.1f}" for v, w in zip(columns, (10, 12, 14, 12), strict=True))
        )
    return "\n".join(lines)
