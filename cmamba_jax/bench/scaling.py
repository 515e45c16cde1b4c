"""`cmamba bench scaling`: training steps over more and more devices, measured and predicted.

Two cases. ``mosei``: the paper's MOSEI configuration, the batch growing with the devices (axis data unless another is
asked for). ``long``: one long sequence, its steps shared out (axis sequence). For every number of devices: steps per
second, memory of a device, and what a step sends, read from the compiled program.

The prediction for up to 256 devices takes a step to last

    time on one device, or c / n of it where devices share out one batch
    + bytes sent / bandwidth + collectives x latency,

with c measured on the most devices there are (or 1), nothing overlapping, all-reduces by rings, exchanges of states
log2(n) in number, and the slower network as soon as there are more devices than a host holds.
"""

import dataclasses
import json
import math
import pathlib
from typing import Any, Literal

import jax
import numpy as np
import tyro
from flax import nnx

from cmamba_jax.batch import Batch
from cmamba_jax.bench.collectives import Collective, read_collectives
from cmamba_jax.bench.timing import median_seconds
from cmamba_jax.config import ExperimentConfig, ModelConfig, ParallelConfig, PipelineConfig, TaskConfig
from cmamba_jax.errors import UserError
from cmamba_jax.models import CoupledMamba
from cmamba_jax.results import records
from cmamba_jax.train import optimizer, parallel, state
from cmamba_jax.train.objective import make_loss_sum

REPEATS = 5
"""Timed runs."""
FARTHEST = 256
"""Devices that the prediction goes to."""
_FEATURES = {"text": 768, "audio": 74, "vision": 35}
_SHARED_OUT = ("tensor", "sequence")
"""Axes whose devices share out one batch; with the others every device has as many samples."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Training steps over more and more devices: speed, memory, communication, and a prediction up to 256."""

    cases: tuple[Literal["mosei", "long"], ...] = ("mosei", "long")
    """mosei: the paper's MOSEI configuration; long: one sequence of 262,144 steps."""
    axis: Literal["data", "pmap", "fsdp", "tensor", "sequence"] | None = None
    """Axis of the mesh, or pmap; None: data for mosei, sequence for long."""
    devices: tuple[int, ...] = ()
    """Numbers of devices; empty: 1, 2, 4, ... up to all."""
    batch: int | None = None
    """Samples a device (mosei: 2048 on accelerators, 4 on a CPU) or in all (long: 1)."""
    length: int | None = None
    """Steps of a sequence (mosei 50; long 262,144, on a CPU 4,096)."""
    d_model: int = 128
    d_state: int | None = None
    """None: 64 for mosei, 16 for long."""
    n_layers: int | None = None
    """None: 3 for mosei, 2 for long."""
    scan: str | None = None
    """Implementation of the scan; None: what the library chooses."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    remat: Literal["none", "layer", "dots"] = "none"
    steps: int = 5
    """Steps of a timed run, of which there are five; the median counts."""
    bandwidth: float = 300.0
    """GB/s that a device sends to others of its host, for the prediction (an H100's NVLink: at most 450)."""
    network: float = 50.0
    """GB/s that a device sends to other hosts (InfiniBand of 400 Gbit/s a device: at most 50)."""
    host: int = 8
    """Devices of a host."""
    latency: float = 20.0
    """Microseconds of a collective, whatever its size."""
    output: pathlib.Path = pathlib.Path("runs/bench")
    """Folder for scaling.json."""
    json: bool = False
    """Print one JSON object instead of tables."""


def main(args: list[str]) -> None:
    """Runs `cmamba bench scaling`.

    Args:
        args: words after ``scaling``.
    """
    options = tyro.cli(Options, args=args, prog="cmamba bench scaling")
    name = "_".join(filter(None, (*options.cases, options.axis, options.scan)))
    result = records.describe("scaling", ["bench", "scaling", *args]) | {"name": name} | measure(options)
    records.save(result, options.output)
    print(json.dumps(result, indent=2) if options.json else _tables(result))


def measure(options: Options) -> dict[str, Any]:
    """Measures every case on every number of devices.

    Returns:
        "cases": for each its "case", "axis", sizes, "results" (by number of
        devices: "steps_per_second", "samples_per_second", "efficiency", "memory_bytes" by the compiler,
        "peak_bytes" by the device or None, "sent_bytes" a step and device, "collectives" by kind) and "prediction".

    Raises:
        UserError: there are fewer devices, or sizes do not divide.
    """
    counts = options.devices or tuple(2**i for i in range(jax.device_count().bit_length()))
    return {
        "cases": [_case(name, options, sorted(counts)) for name in options.cases],
    }


def _case(name: str, options: Options, counts: list[int]) -> dict[str, Any]:
    accelerator = jax.default_backend() != "cpu"
    long = name == "long"
    axis = options.axis or ("sequence" if long else "data")
    batch = options.batch or (1 if long else 2048 if accelerator else 4)
    length = options.length or ((2**18 if accelerator else 2**12) if long else 50)
    model = ModelConfig(
        d_model=options.d_model,
        d_state=options.d_state or (16 if long else 64),
        n_layers=options.n_layers or (2 if long else 3),
        compute_dtype=options.dtype,
        remat=options.remat,
        scan=options.scan,
    )
    records: dict[int, dict[str, Any]] = {}
    collectives: dict[int, list[Collective]] = {}
    # Most devices first: a device's peak of memory never falls, and fewer devices need more.
    for n in reversed(counts):
        rows = batch if axis in _SHARED_OUT else batch * n
        records[n], collectives[n] = _measure(model, axis, n, rows, length, options.steps)
    one = records.get(1)
    for n, record in records.items():
        ideal = one and one["samples_per_second"] * n
        record["efficiency"] = record["samples_per_second"] / ideal if ideal else None
    most = counts[-1]
    prediction = _predict(options, axis, records, collectives[most], most, batch) if one and most > 1 else None
    return {
        "case": name,
        "axis": axis,
        "batch": batch,
        "length": length,
        "model": dataclasses.asdict(model),
        "results": {str(n): records[n] for n in counts},
        "prediction": prediction,
    }


def _measure(
    model: ModelConfig, axis: str, n: int, rows: int, length: int, steps: int
) -> tuple[dict[str, Any], list[Collective]]:
    spread = ParallelConfig(strategy="pmap", data=n) if axis == "pmap" else ParallelConfig(**{axis: n})
    config = ExperimentConfig(
        name="scaling", model=model, pipeline=PipelineConfig(batch_size=rows, eval_batch_size=rows), parallel=spread
    )
    if length % spread.sequence:
        raise UserError(f"length {length} is no multiple of {n} devices; set --length")
    strategy, task = parallel.make_strategy(config), TaskConfig(kind="regression")
    graphdef, params = state.split_model(CoupledMamba(model, features=_FEATURES, task=task, rngs=nnx.Rngs(0)))
    schedule = optimizer.make_schedule(config.optimizer, steps_per_epoch=100, epochs=1)
    transformation = optimizer.make_optimizer(config.optimizer, schedule)
    step = state.make_train_step(graphdef, transformation, make_loss_sum(task, config.train), strategy)
    train_state = strategy.place(state.init_state(params, transformation, seed=0))
    batch = next(strategy.feed(iter([_batch(rows, length)]), rows))

    compiled = step.lower(train_state, batch).compile()
    memory = compiled.memory_analysis()
    collectives = read_collectives(compiled.as_text())
    if axis != "pmap":  # one device alone would take the batch from the host at every step
        batch = jax.device_put(batch, compiled.input_shardings[0][1])
    loss = math.nan

    def train(count: int) -> None:
        nonlocal train_state, loss
        for _ in range(count):
            train_state, metrics = compiled(train_state, batch)
        loss = float(jax.block_until_ready(metrics).loss)

    seconds = median_seconds(train, calls=steps, repeats=REPEATS)
    if not math.isfinite(loss):
        raise UserError(f"the loss on {n} devices is {loss}: nothing worth measuring")
    kinds = sorted({c.kind for c in collectives})
    return {
        "steps_per_second": 1 / seconds,
        "samples_per_second": rows / seconds,
        "memory_bytes": memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes,
        "peak_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
        "sent_bytes": sum(c.sent() for c in collectives),
        "collectives": {kind: sum(c.kind == kind for c in collectives) for kind in kinds},
    }, collectives


def _batch(rows: int, length: int) -> Batch:
    rng = np.random.default_rng(0)
    return Batch(
        inputs={m: rng.standard_normal((rows, length, f), dtype=np.float32) for m, f in _FEATURES.items()},
        mask={m: np.ones((rows, length), bool) for m in _FEATURES},
        labels=rng.standard_normal((rows, 1), dtype=np.float32),
        weight=np.ones(rows, np.float32),
    )


def _predict(
    options: Options,
    axis: str,
    records: dict[int, dict[str, Any]],
    collectives: list[Collective],
    most: int,
    batch: int,
) -> list[dict[str, float]]:
    """A record for each of 1, 2, 4, ... devices; see the module's docstring for what is assumed."""
    first = 1 / records[1]["steps_per_second"]

    def exchange(n: int) -> tuple[float, float]:
        """Bytes sent and collectives of a step on n devices."""
        sent = count = 0.0
        for c in collectives:
            times = math.log2(n) / math.log2(most) if c.kind == "collective-permute" else 1.0
            sent, count = sent + times * c.sent(n), count + times
        return sent, count

    def communication(n: int) -> float:
        if n == 1:
            return 0.0
        sent, count = exchange(n)
        speed = options.bandwidth if n <= options.host else options.network
        return sent / (1e9 * speed) + 1e-6 * options.latency * count

    shared = axis in _SHARED_OUT
    work = max(1.0, (1 / records[most]["steps_per_second"] - communication(most)) * most / first) if shared else 1.0
    curve = []
    for n in (2**i for i in range(FARTHEST.bit_length())):
        seconds = (first if n == 1 else first * work / n if shared else first) + communication(n)
        rows = batch if shared else batch * n
        efficiency = first / seconds / (n if shared else 1)
        curve.append({"devices": n, "samples_per_second": rows / seconds, "efficiency": efficiency,
                      "sent_bytes": exchange(n)[0] if n > 1 else 0.0})  # fmt: skip
    return curve


def _tables(report: dict[str, Any]) -> str:
    lines = [f"{report['device']}, {report['versions']}"]
    for case in report["cases"]:
        model = case["model"]
        share = "in all" if case["axis"] in _SHARED_OUT else "a device"
        lines += [
            "",
            f"{case['case']}: axis {case['axis']}, {case['batch']} samples {share}, {case['length']} steps, d_model "
            f"{model['d_model']}, d_state {model['d_state']}, {model['n_layers']} layers, {model['compute_dtype']}",
            f"{'devices':>8}{'steps/s':>10}{'samples/s':>12}{'efficiency':>12}{'memory MiB':>12}{'peak MiB':>10}"
            f"{'sent MiB':>10}  collectives",
        ]
        for n, r in case["results"].items():
            peak = f"{r['peak_bytes'] / 2**20:>10.0f}" if r["peak_bytes"] else f"{'-':>10}"
            efficiency = f"{r['efficiency']:>12.3f}" if r["efficiency"] else f"{'-':>12}"
            kinds = ", ".join(f"{count} {kind}" for kind, count in r["collectives"].items()) or "none"
            lines.append(
                f"{n:>8}{r['steps_per_second']:>10.3f}{r['samples_per_second']:>12.1f}{efficiency}"
                f"{r['memory_bytes'] / 2**20:>12.0f}{peak}{r['sent_bytes'] / 2**20:>10.2f}  {kinds}"
            )
        if case["prediction"]:
            lines.append("predicted, not measured:")
            for p in case["prediction"]:
                lines.append(f"{p['devices']:>8}{'':>10}{p['samples_per_second']:>12.1f}{p['efficiency']:>12.3f}"
                             f"{'':>22}{p['sent_bytes'] / 2**20:>10.2f}")  # fmt: skip
    return "\n".join(lines)
