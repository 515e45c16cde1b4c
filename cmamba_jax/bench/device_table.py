"""`cmamba bench scan --device-table`: the scan on this accelerator against its limits and against other scans."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from cmamba_jax.bench import peers
from cmamba_jax.bench.timing import copy_bandwidth, median_seconds
from cmamba_jax.bench.tpu_compile import abstract_inputs
from cmamba_jax.errors import UserError
from cmamba_jax.results import records
from pallas_kernels import Shared, choose_implementation, coupled_scan
from pallas_kernels.coupled_scan.cases import BENCHMARKS, Case
from pallas_kernels.coupled_scan.types import Problem

EXPONENTIALS = 16
"""A multiprocessor's exponentials a clock (NVIDIA, compute capability 7.0 to 9.0)."""
KINDS = ("forward", "forward_backward")


def run(
    shapes: Sequence[str],
    sweep: bool,
    implementations: Sequence[str],
    output: pathlib.Path,
    repeats: int,
    head: Mapping[str, Any],
) -> str:
    """Measures, writes device_table.json and device_table.png, and returns the table.

    Args:
        shapes: names in `BENCHMARKS`.
        sweep: whether to sweep L at constant B x L, and B, on the sizes of S2.
        implementations: ours, and the names of installed peers.
        output: folder for the files.
        repeats: timed runs, of which the median counts.
        head: of the record, see `cmamba_jax.results.records.describe`.

    Raises:
        UserError: an unknown implementation, or no accelerator.
    """
    if jax.default_backend() == "cpu":
        raise UserError("bench scan --device-table needs a GPU or a TPU; the default device is a CPU")
    cases = {name: BENCHMARKS[name] for name in shapes}
    if sweep:
        base = BENCHMARKS["S2"]
        for length in (512, 2048, 8192, 32_768, 131_072, 262_144):
            cases[f"L={length}"] = dataclasses.replace(base, B=max(1, 32_768 // length), L=length)
        for batch in (1, 4, 16):
            cases[f"B={batch}"] = dataclasses.replace(base, B=batch)
    report = {
        **head,
        "bandwidth_bytes_per_second": copy_bandwidth(),
        "repeats": repeats,
        "results": [],
    }
    for name, case in tqdm(cases.items(), desc="shapes", leave=False):
        record = {"shape": name, "case": dataclasses.asdict(case), "floor_ms": _floor(case, report)}
        for implementation in implementations:
            record[implementation] = _measure(implementation, case, repeats)
        report["results"].append(record)
        records.save(report, output)  # after every shape: a sweep takes minutes, and what it has measured stays
    _plot(report, implementations, output / "device_table.png")
    return _table(report, implementations)


def _measure(implementation: str, case: Case, repeats: int) -> dict[str, Any]:
    record: dict[str, Any] = {}
    try:
        if implementation in peers.RUNNERS:
            functions = peers.RUNNERS[implementation](case)
        else:
            functions, record = _ours(implementation, case)
        for kind in KINDS:
            record[f"{kind}_ms"] = _median_ms(functions[kind], repeats)
    except Exception as error:  # a peer that cannot, or has no memory left, is a result
        record["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return record


def _ours(implementation: str, case: Case) -> tuple[dict[str, Callable[[int], None]], dict[str, Any]]:
    inputs, y_bar = _draw(case)
    name = choose_implementation(Problem(**inputs)).name if implementation == "chosen" else implementation

    def scan(inputs: dict[str, Any]) -> jax.Array:
        return coupled_scan(**inputs, implementation=name).y

    def forward_backward(inputs: dict[str, Any], y_bar: jax.Array) -> Any:
        y, vjp = jax.vjp(scan, inputs)
        return y, vjp(y_bar)[0]

    forward = jax.jit(scan).lower(inputs).compile()
    both = jax.jit(forward_backward).lower(inputs, y_bar).compile()
    record = {
        "implementation": name,
        "forward_temp_bytes": forward.memory_analysis().temp_size_in_bytes,
        "forward_backward_temp_bytes": both.memory_analysis().temp_size_in_bytes,
        "input_bytes": sum(v.size * v.dtype.itemsize for v in jax.tree.leaves(inputs)),
    }
    functions = {"forward": peers.repeated(forward, inputs), "forward_backward": peers.repeated(both, inputs, y_bar)}
    return functions, record


def _draw(case: Case) -> tuple[dict[str, Any], jax.Array]:
    """Inputs like `make_inputs` and a cotangent of y, drawn on the device."""
    shapes = abstract_inputs(case)
    keys = iter(jax.random.split(jax.random.key(0), 16))

    def normal(name: str) -> jax.Array:
        return jax.random.normal(next(keys), shapes[name].shape, shapes[name].dtype)

    inputs = {name: normal(name) for name in ("x", "z", "B", "C")}
    inputs["dt"] = 0.5 * normal("dt")
    inputs["A"] = -jnp.arange(1, case.N + 1) * jnp.exp(0.1 * normal("A"))
    inputs["D"] = 1 + 0.1 * normal("D")
    steps = jnp.exp(jnp.log(1e-3) + jnp.log(1e2) * jax.random.uniform(next(keys), shapes["dt_bias"].shape))
    inputs["dt_bias"] = jnp.log(jnp.expm1(steps))
    inputs["coupling"] = Shared(jax.nn.log_softmax(jax.random.normal(next(keys), (case.M, case.N)), axis=0))
    return inputs, normal("x")


def _floor(case: Case, report: dict[str, Any]) -> dict[str, float]:
    """Least ms for the exponentials at the highest clock, and for reading x, dt, z and writing y."""
    device = jax.devices()[0]
    count = case.M * case.B * case.L * case.D
    size = 2 if case.dtype == "bfloat16" else 4
    floors = {"bytes": 1e3 * 4 * count * size / report["bandwidth_bytes_per_second"]}
    if hasattr(device, "core_count") and hasattr(device, "clock_rate"):
        rate = EXPONENTIALS * device.core_count * 1e3 * device.clock_rate
        floors["exp"] = 1e3 * count * case.N / rate
    elif "H100" in device.device_kind or "H200" in device.device_kind:
        floors["exp"] = 1e3 * count * case.N / (EXPONENTIALS * 132 * 1.98e9)
    return floors


def _median_ms(function: Callable[[int], None], repeats: int) -> float:
    return 1e3 * median_seconds(function, repeats=repeats)


def _table(report: dict[str, Any], names: Sequence[str]) -> str:
    lines = [
        f"{report['device']}, {report['versions']}; medians of {report['repeats']} runs, ms",
        f"copy bandwidth {report['bandwidth_bytes_per_second'] / 1e12:.2f} TB/s",
        "",
        "".join(
            [
                f"{'shape':10}{'floor: exp':>12}{'bytes':>8}  {'':22}",
                f"{'forward':>10}{'+ backward':>12}{'temp, % of input':>18}",
            ]
        ),
    ]
    for record in report["results"]:
        floor = record["floor_ms"]
        head = f"{record['shape']:10}{floor.get('exp', float('nan')):12.3f}{floor['bytes']:8.3f}  "
        for name in names:
            result = record[name]
            label = result.get("implementation", name)
            if "forward_backward_ms" in result:
                text = f"{label:22}{result['forward_ms']:10.3f}{result['forward_backward_ms']:12.3f}"
                if "input_bytes" in result:
                    text += f"{100 * result['forward_backward_temp_bytes'] / result['input_bytes']:18.1f}"
            else:
                text = f"{label:22}{result['error']}"
            lines.append(head + text)
            head = " " * 32
    return "\n".join(lines)


def _plot(report: dict[str, Any], names: Sequence[str], path: pathlib.Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2), KINDS, strict=True):
        shapes = [record["shape"] for record in report["results"]]
        for k, name in enumerate(names):
            times = [record[name].get(f"{kind}_ms", float("nan")) for record in report["results"]]
            positions = [i + 0.8 * k / len(names) for i in range(len(shapes))]
            axes.bar(positions, times, 0.8 / len(names), label=name, align="edge")
        if kind == "forward":
            floors = [max(record["floor_ms"].values()) for record in report["results"]]
            axes.hlines(floors, range(len(shapes)), [i + 0.8 for i in range(len(shapes))], "black", label="floor")
        axes.set_xticks([i + 0.4 for i in range(len(shapes))], shapes, rotation=45)
        axes.set(yscale="log", ylabel="ms", title=kind.replace("_", " + "))
    axes.legend()
    figure.suptitle(report["device"])
    figure.savefig(path, dpi=120)
