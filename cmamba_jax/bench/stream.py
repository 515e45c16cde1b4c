"""Live streams: latency of a step and steps a second, from one stream to many that advance together."""

import dataclasses
import json
import os
import pathlib
import time
from typing import Any

import numpy as np
import tyro
from flax import nnx

from cmamba_jax.config import ExperimentConfig, ModelConfig, TaskConfig
from cmamba_jax.data import DataInfo, Normalizer
from cmamba_jax.deploy.streaming import StreamingSession
from cmamba_jax.models import CoupledMamba
from cmamba_jax.results import records
from cmamba_jax.train.inference import Run, load_run

# The model of configs/watch.py; its speed does not depend on what it has learned.
_MODEL = ModelConfig(
    d_model=32, d_state=16, n_layers=2, frame=4, encoder="conv", encoder_width=3, pooling="mean", fusion="concat"
)
_INFO = DataInfo({"accelerometer": 3, "gyroscope": 3}, TaskConfig("classification", 7), tuple("0123456"))


@dataclasses.dataclass(frozen=True)
class Options:
    """Time `StreamingSession.push`: raw samples in, probabilities out, on the default device."""

    run: pathlib.Path | None = None
    """Folder of a run; None: an untrained model of the size of configs/watch.py."""
    streams: tuple[int, ...] = (1, 4, 16, 64, 256, 1024)
    """Numbers of streams that advance together."""
    steps: int = 200
    """Steps of the model to time, for each number of streams."""
    cores: int | None = None
    """Keep to this many CPU cores (Linux); None: all."""
    output: pathlib.Path = pathlib.Path("runs/bench")
    """Folder for stream.json."""
    json: bool = False
    """Print one JSON object instead of a table."""


def main(args: list[str]) -> None:
    """Runs `cmamba bench stream`.

    Args:
        args: words after ``stream``.
    """
    options = tyro.cli(Options, args=args, prog="cmamba bench stream")
    if options.cores is not None:
        # Before the first computation: JAX makes as many threads as there are cores then.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    run = untrained() if options.run is None else load_run(options.run)
    results = [measure(run, streams, options.steps) for streams in options.streams]
    record = records.describe("stream", ["bench", "stream", *args]) | {"steps": options.steps, "results": results}
    records.save(record, options.output)
    if options.json:
        print(json.dumps(record, indent=2))
        return
    frame = run.config.model.frame
    print(f"{'streams':>8}{'median ms':>12}{'p99 ms':>12}{'steps/s':>12}{'stream steps/s':>17}{'state KiB':>12}")
    for r in results:
        print(
            f"{r['streams']:>8}{r['median_ms']:>12.3f}{r['p99_ms']:>12.3f}{r['steps_per_s']:>12,.0f}"
            f"{r['stream_steps_per_s']:>17,.0f}{r['state_kib']:>12,.0f}"
        )
    if frame > 1:
        print(f"A step of the model is a frame of {frame} samples: {frame} calls of push, one answer.")


def untrained() -> Run:
    """A run with random parameters, of the size of configs/watch.py."""
    normalizer = Normalizer(
        {name: np.zeros(f, np.float32) for name, f in _INFO.features.items()},
        {name: np.ones(f, np.float32) for name, f in _INFO.features.items()},
    )
    model = CoupledMamba(_MODEL, features=_INFO.features, task=_INFO.task, rngs=nnx.Rngs(0))
    return Run(pathlib.Path(), ExperimentConfig("watch", model=_MODEL), _INFO, normalizer, model, 0)


def measure(run: Run, streams: int, steps: int) -> dict[str, Any]:
    """Times `steps` steps of the model.

    Returns:
        "streams"; "median_ms" and "p99_ms" of a step, with everything that happens on the host; "steps_per_s" and, for
        all streams together, "stream_steps_per_s", from the total time; "state_kib", what is kept between two steps.
    """
    session = StreamingSession(run, streams=streams)
    rng = np.random.default_rng(0)
    frame = run.config.model.frame
    samples = [
        {m: rng.standard_normal((streams, f), np.float32) for m, f in run.info.features.items()} for _ in range(frame)
    ]
    times = []
    for i in range(steps + 10):
        start = time.perf_counter()
        for sample in samples:
            session.push(sample)
        if i >= 10:  # The first ones compile and warm up.
            times.append(time.perf_counter() - start)
    rate = steps / sum(times)
    return {
        "streams": streams,
        "median_ms": 1e3 * float(np.median(times)),
        "p99_ms": 1e3 * float(np.percentile(times, 99)),
        "steps_per_s": rate,
        "stream_steps_per_s": rate * streams,
        "state_kib": session.nbytes / 1024,
    }
