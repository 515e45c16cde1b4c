"""`cmamba bench tpu-static`: what the TPU compiler says about the scan kernels, on a machine without a TPU.

libtpu compiles for a chip that is not there and dumps its schedule: the VLIW bundles of every loop, with the slots that
each fills. A bundle takes a cycle, waits aside, so counts are a static figure of speed, free of noise. They are
predictions of a compiler, never measurements.

bundles/step   of the loops over time, for one step of 128 channels of one sample, all modalities and states
vector, exp    the same, if the vector slots (or the one exponential slot) were all that counts: the floors
predicted ms   cycles of the call over the clock, if memory never made the chip wait
memory ms      bytes of arguments and results over the memory bandwidth: the other floor

Baselines: `loop`, the recurrence as a straightforward Pallas kernel of 128, 256 or 512 channels a block, and `xla`, one
associative scan in plain XLA for one sample, by XLA's own estimate of its cycles.
"""

import dataclasses
import importlib.metadata
import json
import pathlib
import re
import tempfile
from typing import Any, Literal

import tyro

from cmamba_jax.bench.tpu_compile import Job, abstract_inputs, compile_all
from cmamba_jax.errors import UserError
from cmamba_jax.results import records
from pallas_kernels.coupled_scan.cases import BENCHMARKS

SPEEDS = {"v5e": (1.5e9, 819e9), "v5p": (1.75e9, 2765e9), "v6e": (1.75e9, 1640e9), "tpu7x": (2.2e9, 3690e9)}
"""Clock in Hz (from peak bfloat16 FLOP/s and the size of the matrix units) and bytes/s of memory, for each chip; for
tpu7x of one of its two devices. The two cores of a v5p are counted as one: its prediction is for half a chip."""

_LANES = 128
_TILE = 128  # Steps a time tile of the kernels at the benchmarked lengths; S1 has one shorter tile.
_KERNELS = {
    "coupled_scan_forward": ("prepare", "walk", "finish"),
    "coupled_scan_backward": ("prepare", "rebuild", "walk back", "finish"),
    "plain_loop": ("walk",),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Static figures of the TPU kernels of the scan from the TPU compiler; needs libtpu, but no TPU."""

    case: Literal["S1", "S2", "S3", "S4"] = "S2"
    """Shape; the baselines need a length that is a multiple of 128 and are left out for S1."""
    chip: Literal["v5e", "v5p", "v6e", "tpu7x"] = "v5e"
    output: pathlib.Path = pathlib.Path("runs/bench")
    """Folder for tpu_static.json."""
    json: bool = False
    """Print one JSON object instead of a table."""


@dataclasses.dataclass(frozen=True)
class Loop:
    """An innermost loop of a schedule.

    Attributes:
        bundles: of one iteration.
        vector: vector slots that an iteration fills.
        exp: exponentials and the like.
        spills: registers stored away and loaded again.
    """

    bundles: int
    vector: int
    exp: int
    spills: int


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A kernel's schedule.

    Attributes:
        bundles: all of them.
        loops: the innermost loops by name, in the order of the program.
        vector_slots: of a bundle.
    """

    bundles: int
    loops: dict[str, Loop]
    vector_slots: int


def main(args: list[str]) -> None:
    """Runs `cmamba bench tpu-static`.

    Args:
        args: words after ``tpu-static``.
    """
    options = tyro.cli(Options, args=args, prog="cmamba bench tpu-static")
    report = measure(options.case, options.chip)
    report = records.describe("tpu_static", ["bench", "tpu-static", *args]) | report
    records.save(report, options.output)
    print(json.dumps(report, indent=2) if options.json else _table(report))


def measure(case_name: str, chip: str) -> dict[str, Any]:
    """Compiles the kernels and the baselines and reads the compiler's schedules.

    Returns:
        "libtpu", its version; "chip", "case", and "results": records with "name", "bundles_per_step", "vector_floor",
        "exp_floor", "predicted_ms" and "memory_ms" (None where there is no such figure), and "loops" with the counts.

    Raises:
        UserError: libtpu is not installed, or something does not compile.
    """
    case = BENCHMARKS[case_name]
    jobs = [Job(chip, dataclasses.asdict(case), "forward_backward")]
    if case.L % _TILE == 0:
        plain = dataclasses.asdict(dataclasses.replace(case, skip=False, gate=False, dt_bias=False))
        jobs += [Job(chip, plain, "loop", width) for width in (128, 256, 512)]
        jobs.append(Job(chip, plain | {"B": 1, "L": min(case.L, 2048)}, "xla"))
    results = []
    for job in jobs:
        with tempfile.TemporaryDirectory() as folder:
            (record,) = compile_all([job], pathlib.Path(folder))
            if record["error"]:
                raise UserError(f"{job.kind} does not compile for {chip}: {record['error']}")
            if job.kind == "xla":
                steps = job.case["B"] * job.case["L"] * case.D / _LANES
                results.append({"name": "xla", "bundles_per_step": estimated_cycles(record["text"]) / steps})
            elif job.kind == "loop":
                loops = read_schedule(pathlib.Path(folder), "plain_loop")
                results.append({"name": f"loop {job.width}"} | _figures(loops, {"walk": job.width // _LANES}))
            else:
                results += _kernel_records(case, chip, pathlib.Path(folder))
    return {"libtpu": importlib.metadata.version("libtpu"), "chip": chip, "case": case_name, "results": results}


def read_schedule(folder: pathlib.Path, kernel: str) -> Schedule:
    """Reads the schedule of a kernel from the compiler's dump.

    Args:
        folder: what `compile_all` was given.
        kernel: key of `_KERNELS`.

    Raises:
        UserError: the dump lacks the kernel, or has other loops than are known: the compiler has changed.
    """
    paths = [p for p in folder.glob(f"*{kernel}*final_bundles.txt") if "schedule-analysis" not in p.name]
    if len(paths) != 1:
        raise UserError(f"expected one schedule of {kernel} in the compiler's dump, found {len(paths)}")
    prefix = re.sub(r"\d+-final_bundles\.txt$", "", paths[0].name)
    (table,) = folder.glob(f"{prefix}*-final_hlo-static-per-bundle-utilization.txt")
    columns, capacity, slots = _read_slots(table.read_text())
    depths = _read_depths(paths[0].read_text())
    loops = [
        Loop(
            bundles=end - start,
            vector=sum(row[columns.index("VALU")] for row in slots[start:end]),
            exp=sum(row[columns.index("EUP")] for row in slots[start:end]),
            spills=sum(row[columns.index("VSTORE:SPILL")] for row in slots[start:end]),
        )
        for start, end in _innermost(depths)
    ]
    names = _KERNELS[kernel]
    if len(loops) != len(names):
        raise UserError(f"expected the loops {', '.join(names)} in {kernel}, found {len(loops)} loops")
    return Schedule(len(slots), dict(zip(names, loops, strict=True)), capacity[columns.index("VALU")])


def _read_slots(text: str) -> tuple[list[str], list[int], list[list[int]]]:
    """Names of the slots, how many a bundle has, and how many each bundle fills."""
    lines = text.splitlines()
    columns = lines[1].replace(" ", "").split(",")
    rows = [[int(v) for v in line.split()] for line in lines[2:] if re.fullmatch(r"[\d\s]+", line)]
    return columns, rows[0], rows[1:]


def _read_depths(text: str) -> list[tuple[int, bool, int]]:
    """(address, whether a loop starts there, how many loops it is in) of the bundles that the dump lists."""
    pattern = re.compile(r"^\s*(?:0x)?([0-9a-f]+)\s+([A-Z]{2})?[^:{]*:\s*(>*)", re.MULTILINE)
    return [(int(address, 16), mark == "LB", len(depth)) for address, mark, depth in pattern.findall(text)]


def _innermost(bundles: list[tuple[int, bool, int]]) -> list[tuple[int, int]]:
    """First and one past the last address of the loops that hold no loop, but for the loop over the grid."""
    starts = [i for i, (_, starts_loop, depth) in enumerate(bundles) if starts_loop and depth > 1]
    found = []
    for i in starts:
        depth = bundles[i][2]
        end = i + 1
        # Bundles of an enclosing loop are moved into a loop's last ones, one or two at a time.
        while end < len(bundles) and any(d >= depth for _, _, d in bundles[end : end + 3]) and not bundles[end][1]:
            end += 1
        nested = end < len(bundles) and bundles[end][1] and bundles[end][2] > depth
        if not nested:
            found.append((bundles[i][0], bundles[end - 1][0] + 1))
    return found


def estimated_cycles(text: str) -> int:
    """Sum of XLA's estimates over a compiled program without loops."""
    return sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text)))


def _figures(schedule: Schedule, per_step: dict[str, float]) -> dict[str, Any]:
    """Counts of the loops over time for a step of 128 channels; per_step: (step, 128 channels) an iteration covers."""
    walks = {name: (schedule.loops[name], count) for name, count in per_step.items()}
    return {
        "bundles_per_step": sum(loop.bundles / count for loop, count in walks.values()),
        "vector_floor": sum(loop.vector / schedule.vector_slots / count for loop, count in walks.values()),
        "exp_floor": sum(loop.exp / count for loop, count in walks.values()),
        "loops": {name: dataclasses.asdict(loop) for name, loop in schedule.loops.items()},
    }


def _kernel_records(case: Any, chip: str, folder: pathlib.Path) -> list[dict[str, Any]]:
    """The records of the forward and the backward kernel."""
    from pallas_kernels.coupled_scan.mosaic_tpu import backward, forward
    from pallas_kernels.coupled_scan.mosaic_tpu.plan import LANES, Plan
    from pallas_kernels.coupled_scan.types import Problem

    plan = Plan.of(Problem(**abstract_inputs(case)))
    clock, bandwidth = SPEEDS[chip]
    slabs, chunks = plan.states // plan.slab, -(-min(plan.L, plan.tile) // plan.steps)
    values = case.M * case.B * case.L * case.D * 2
    # Forward: x, dt, z, y. Backward: x, dt, z, y_bar and the gradients of x, dt, z.
    traffic = {"forward": 4 * values, "backward": 7 * values}
    found = []
    for name, module in (("forward", forward), ("backward", backward)):
        schedule = read_schedule(folder, f"coupled_scan_{name}")
        width = plan.width(module.WIDTH)
        walks = [loop for loop in schedule.loops if loop not in ("prepare", "finish")]
        figures = _figures(schedule, dict.fromkeys(walks, plan.steps * (width // LANES) / slabs))
        trips = dict.fromkeys(walks, chunks * slabs) | {"prepare": case.M, "finish": case.M}
        # What is in no loop runs once a grid step, though most of it only at some of them.
        cycles = schedule.bundles + sum((trips[n] - 1) * loop.bundles for n, loop in schedule.loops.items())
        grid = case.B * plan.tiles * plan.groups(width)
        figures |= {"predicted_ms": 1e3 * grid * cycles / clock, "memory_ms": 1e3 * traffic[name] / bandwidth}
        found.append({"name": name} | figures)
    return found


def _table(report: dict[str, Any]) -> str:
    case = BENCHMARKS[report["case"]]
    sizes = ", ".join(f"{axis} {getattr(case, axis)}" for axis in "MBLDN")
    keys = ("bundles_per_step", "vector_floor", "exp_floor", "predicted_ms", "memory_ms")
    heads = ("bundles/step", "vector", "exp", "predicted ms", "memory ms")
    lines = [
        f"{report['chip']}, {report['case']}: {case.coupling} coupling, {sizes}, {case.dtype}",
        "predictions of the TPU compiler; nothing here ran on a TPU",
        "",
        f"{'':10}" + "".join(f"{head:>14}" for head in heads),
    ]
    for record in report["results"]:
        cells = (f"{record[key]:14.2f}" if record.get(key) is not None else f"{'-':>14}" for key in keys)
        lines.append(f"{record['name']:10}" + "".join(cells))
    return "\n".join(lines)
