"""`cmamba bench efficiency`: time and memory over the length of a sequence, coupled against cross-attention.

The paper's Figures 3 and 4, which go from 100 to 500 steps, and on to 65,536: the paper's configuration, and crossmodal
attention of as many parameters, each predicting and training. Attention is cuDNN's flash attention where the device has
it (`models.attention.attend`), elsewhere XLA's, which keeps all products of two steps.

Every model runs in a process of its own, which walks up the lengths: so the peak of a device is the model's, and what
takes too long can be ended. What would not fit in memory is not tried, by the compiler's figure.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import multiprocessing
import pathlib
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import tyro
from tqdm import tqdm

from cmamba_jax.config import ModelConfig, OptimizerConfig, TaskConfig, TrainConfig
from cmamba_jax.errors import UserError
from cmamba_jax.results import records

KINDS = ("inference", "training")
MODELS = ("coupled", "cross_attention")
_FEATURES = {"text": 768, "audio": 74, "vision": 35}
_TASK = TaskConfig(kind="regression")
_ENOUGH_SECONDS = 10.0
"""Timed runs end after as many seconds, though there be fewer than `repeats`."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Median time and peak memory of inference and of a training step, coupled against cross-attention."""

    lengths: tuple[int, ...] = (100, 200, 300, 400, 500, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536)
    """Steps of the sequences; those of the paper's figures are 100 to 500."""
    kinds: tuple[Literal["inference", "training"], ...] = KINDS
    """What the models do."""
    batch: int | None = None
    """Sequences at once; None: 8 on accelerators, 1 on a CPU."""
    d_model: int = 128
    """Width of the coupled model; that of the attention gives it as many parameters."""
    d_state: int = 64
    n_layers: int = 3
    dtype: Literal["float32", "bfloat16"] | None = None
    """None: bfloat16 on accelerators, float32 on a CPU."""
    repeats: int = 7
    """Timed runs, after one that warms up; fewer of what takes seconds."""
    limit: float = 300.0
    """Seconds after which a length, and all greater ones, count as too slow."""
    memory: float | None = None
    """GiB that may be used; None: the device's, or 70% of what is available to a CPU."""
    output: pathlib.Path = pathlib.Path("runs/bench")
    """Folder for efficiency.json and efficiency.png."""
    json: bool = False
    """Print one JSON object instead of a table."""


def main(args: list[str]) -> None:
    """Runs `cmamba bench efficiency`.

    Args:
        args: words after ``efficiency``.
    """
    options = tyro.cli(Options, args=args, prog="cmamba bench efficiency")
    report = measure(options, ["bench", "efficiency", *args])
    records.save(report, options.output)
    plot(report, options.output / "efficiency.png")
    print(json.dumps(report, indent=2) if options.json else table(report))


def measure(options: Options, words: Sequence[str] = ("bench", "efficiency")) -> dict[str, Any]:
    """Measures both models, both kinds of work and all lengths.

    Args:
        options: what to measure.
        words: the command line, for the record.

    Returns:
        A record: its head (`records.describe`); "batch", "dtype", "repeats", "memory_limit_bytes"; "models", for
        each its "d_model" and "parameters"; "results", for each length in ascending order "length" and, by kind of
        work and model, "memory_bytes" (arguments, results and temporaries, by the compiler), "peak_bytes" (by the
        device; None where it does not count) and "ms", or "error" where there is no time: "out of memory", "too slow".

    Raises:
        UserError: a length or another size is no positive number, or no attention has as many parameters.
    """
    lengths = sorted(set(options.lengths))
    if not lengths or min(*lengths, options.batch or 1, options.repeats) < 1 or options.limit <= 0:
        raise UserError("bench efficiency: lengths, batch, repeats and limit have to be positive")
    results: list[dict[str, Any]] = [{"length": length} for length in lengths]
    head: dict[str, Any] = {}
    for kind, name in itertools.product(options.kinds, MODELS):
        timed, waiting = True, results
        while waiting:
            with _process(options, words, kind, name, [record["length"] for record in waiting], timed) as receive:
                head = receive()
                if "error" in head:
                    raise UserError(f"bench efficiency: {head['error']}")
                for record in tqdm(waiting, desc=f"{kind}, {name}", leave=False):
                    own = record.setdefault(kind, {})[name] = receive()
                    if own.pop("prepared", False):
                        own |= receive() if timed else {"error": "not tried"}
                    if own.get("error") == "too slow":
                        break
            # Where the time was up, another process finds what memory the greater lengths would take.
            timed, waiting = False, waiting[waiting.index(record) + 1 :]
    return head | {"results": results}


@contextlib.contextmanager
def _process(
    options: Options, words: Sequence[str], kind: str, name: str, lengths: list[int], timed: bool
) -> Iterator[Callable[[], dict[str, Any]]]:
    """A process that measures; yields a function that waits for its next record, and ends it afterwards."""
    context = multiprocessing.get_context("spawn")  # A fork would share the parent's threads and device.
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_walk, args=(sender, options, words, kind, name, lengths, timed), daemon=True)
    process.start()
    sender.close()

    def receive() -> dict[str, Any]:
        try:
            return receiver.recv() if receiver.poll(options.limit) else {"error": "too slow"}
        except EOFError:
            process.join()
            if process.exitcode != -signal.SIGKILL:
                raise RuntimeError(f"the process that measures {name} failed, see above") from None
            return {"error": "out of memory"}  # The system ended it.

    try:
        yield receive
    finally:
        process.kill()
        process.join()
        receiver.close()


def _walk(
    sender: Any, options: Options, words: Sequence[str], kind: str, name: str, lengths: list[int], timed: bool
) -> None:
    """In a process of its own: sends the head of the report, then one or two records for each length."""
    import jax

    try:
        accelerator = jax.default_backend() != "cpu"
        configs = models(options, options.dtype or ("bfloat16" if accelerator else "float32"))
        batch, memory = options.batch or (8 if accelerator else 1), _memory_limit(options)
        # Not in the parent: it would take memory of the device.
        sender.send(records.describe("efficiency", words) | _settings(configs, batch, memory, options.repeats))
    except UserError as error:
        sender.send({"error": str(error)})
        return
    for length in lengths:
        try:
            compiled, draw = prepare(configs[name], kind, batch, length)
            record: dict[str, Any] = {"memory_bytes": _program_bytes(compiled), "peak_bytes": None}
            if memory is not None and record["memory_bytes"] > memory:
                sender.send(record | {"error": "out of memory"})
                continue
            sender.send(record | {"prepared": True})
            if timed:
                ms = _median_ms(compiled, draw(), options.repeats)
                peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
                sender.send({"ms": ms, "peak_bytes": peak})
        except Exception as error:  # What a device cannot do is a result.
            full = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
            text = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            sender.send({"error": "out of memory" if full else text})


def models(options: Options, dtype: str) -> dict[str, ModelConfig]:
    """The configurations that are compared, by the names in `MODELS`, with numbers of parameters within 5%."""
    from cmamba_jax.models.size import abstract_params, count, match_width

    coupled = ModelConfig(
        d_model=options.d_model, d_state=options.d_state, n_layers=options.n_layers, compute_dtype=dtype
    )
    parameters = count(abstract_params(coupled, _FEATURES, _TASK))
    attention = dataclasses.replace(coupled, coupling="cross_attention")
    return {"coupled": coupled, "cross_attention": match_width(attention, _FEATURES, _TASK, parameters)}


def _settings(configs: dict[str, ModelConfig], batch: int, memory: float | None, repeats: int) -> dict[str, Any]:
    from cmamba_jax.models.size import abstract_params, count

    return {
        "batch": batch,
        "dtype": configs["coupled"].compute_dtype,
        "repeats": repeats,
        "memory_limit_bytes": memory,
        "models": {
            name: {"d_model": config.d_model, "parameters": count(abstract_params(config, _FEATURES, _TASK))}
            for name, config in configs.items()
        },
    }


def prepare(config: ModelConfig, kind: str, batch: int, length: int) -> tuple[Any, Callable[[], tuple[Any, Any]]]:
    """Compiles the work without allocating anything.

    Args:
        config: the model.
        kind: "inference": ``f(params, batch) -> logits``; "training": ``f(state, batch) -> (state, metrics)``, the
            training step of the package with the paper's optimiser, which is given its state.
        batch: sequences.
        length: their steps.

    Returns:
        The compiled function, and a function that draws its arguments.
    """
    import jax
    import numpy as np
    from flax import nnx

    from cmamba_jax.batch import Batch
    from cmamba_jax.models import CoupledMamba
    from cmamba_jax.train import optimizer, state
    from cmamba_jax.train.objective import make_loss_sum

    graphdef, params = state.split_model(CoupledMamba(config, features=_FEATURES, task=_TASK, rngs=nnx.Rngs(0)))

    def data() -> Batch:
        rng = np.random.default_rng(0)
        return Batch(
            inputs={m: rng.standard_normal((batch, length, f), dtype=np.float32) for m, f in _FEATURES.items()},
            labels=rng.standard_normal((batch, 1), dtype=np.float32),
            weight=np.ones(batch, np.float32),
        )

    function, first = jax.jit(state.predict_step(graphdef)), params
    if kind == "training":
        settings = OptimizerConfig()
        schedule = optimizer.make_schedule(settings, steps_per_epoch=100, epochs=1)
        transformation = optimizer.make_optimizer(settings, schedule)
        function = state.make_train_step(graphdef, transformation, make_loss_sum(_TASK, TrainConfig()))
        first = state.init_state(params, transformation, seed=0)
    abstract = Batch(
        inputs={m: jax.ShapeDtypeStruct((batch, length, f), np.float32) for m, f in _FEATURES.items()},
        labels=jax.ShapeDtypeStruct((batch, 1), np.float32),
        weight=jax.ShapeDtypeStruct((batch,), np.float32),
    )
    return function.lower(first, abstract).compile(), lambda: (first, jax.device_put(data()))


def _program_bytes(compiled: Any) -> int:
    """What a compiled program needs at once: arguments, results and temporaries."""
    memory = compiled.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )


def _memory_limit(options: Options) -> float | None:
    """Bytes that may be used; None: the device will say."""
    import jax

    if options.memory is not None:
        return options.memory * 2**30
    if jax.default_backend() != "cpu":
        return None
    for line in pathlib.Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 0.7 * 1024 * int(line.split()[1])
    return None


def _median_ms(compiled: Any, arguments: tuple[Any, Any], repeats: int) -> float:
    """Median over the runs after the first; the first itself, where it takes more than `_ENOUGH_SECONDS`."""
    import jax

    first, batch = arguments
    times: list[float] = []
    while len(times) <= repeats and sum(times) < _ENOUGH_SECONDS:
        start = time.perf_counter()
        out = jax.block_until_ready(compiled(first, batch))
        times.append(time.perf_counter() - start)
        if isinstance(out, tuple):
            first = out[0]  # A training step gives back the state that it was given.
    return 1e3 * statistics.median(times[1:] or times)


def less(own: dict[str, Any], other: dict[str, Any], key: str) -> float:
    """Share by which a figure of one record is below that of another, e.g. 0.837; nan where one is lacking."""
    if not own.get(key) or not other.get(key):
        return math.nan
    return 1 - own[key] / other[key]


def memory_of(record: dict[str, Any]) -> int | None:
    """Peak memory in bytes: the device's count, or the compiler's figure where the device has none."""
    return record.get("peak_bytes") or record.get("memory_bytes")


def table(report: dict[str, Any]) -> str:
    """The figures as text, coupled and cross-attention, with the share that the coupled model saves."""
    sizes = ", ".join(f"{n} {m['d_model']} wide ({m['parameters']:,} parameters)" for n, m in report["models"].items())
    kinds = _kinds(report)
    counted = any(r[kind][name].get("peak_bytes") for r in report["results"] for kind in kinds for name in MODELS)
    lines = [
        f"{report['device']}, {report['versions']}",
        f"batch {report['batch']}, {report['dtype']}; {sizes}",
        f"medians of up to {report['repeats']} runs; memory by the {'device' if counted else 'compiler'}",
    ]
    for kind in kinds:
        lines += ["", f"{kind:>8}{'memory, MiB':>22}{'time, ms':>34}"]
        lines += [f"{'L':>8}{'coupled':>10}{'attention':>12}{'less':>8}{'coupled':>14}{'attention':>16}{'less':>8}"]
        for record in report["results"]:
            own, other = (record[kind][name] for name in MODELS)
            memory = [memory_of(r) for r in (own, other)]
            cells = [f"{m / 2**20:,.0f}" if m else "-" for m in memory]
            saved = less(own | {"memory": memory[0]}, other | {"memory": memory[1]}, "memory")
            times = [f"{r['ms']:,.1f}" if "ms" in r else r["error"] for r in (own, other)]
            lines.append(
                f"{record['length']:>8}{cells[0]:>10}{cells[1]:>12}{percent(saved):>8}"
                f"{times[0]:>14}{times[1]:>16}{percent(less(own, other, 'ms')):>8}"
            )
    return "\n".join(lines)


def _kinds(report: dict[str, Any]) -> list[str]:
    return [kind for kind in KINDS if kind in report["results"][0]]


def percent(share: float) -> str:
    """A share for a table; "-" for nan."""
    return "-" if math.isnan(share) else f"{100 * share:.1f}%"


def plot(report: dict[str, Any], path: pathlib.Path) -> None:
    """Draws memory and time over the length, as Figures 3 and 4 of the paper; hollow: predicted, but too large."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    lengths = [record["length"] for record in report["results"]]
    left, right = figure.subplots(1, 2)
    for name, color in zip(MODELS, ("tab:blue", "tab:orange"), strict=True):
        for kind, style in zip(_kinds(report), ("--", "-"), strict=False):
            rows = [record[kind][name] for record in report["results"]]
            label = f"{name.replace('_', '-')}, {kind}"
            memory = [(memory_of(row) or math.nan) / 2**30 for row in rows]
            left.plot(lengths, memory, style, color=color, label=label)
            for fits, fill in ((True, color), (False, "white")):
                marks = [m if ("ms" in row) == fits else math.nan for m, row in zip(memory, rows, strict=True)]
                left.plot(lengths, marks, "o", color=color, markerfacecolor=fill, markersize=4)
            times = [row.get("ms", math.nan) / 1e3 for row in rows]
            right.plot(lengths, times, f"o{style}", color=color, label=label, markersize=4)
    left.set(xscale="log", yscale="log", xlabel="steps", ylabel="GiB", title="peak memory")
    right.set(xscale="log", yscale="log", xlabel="steps", ylabel="seconds", title="time")
    right.legend()
    figure.suptitle(f"{report['device']}, batch {report['batch']}, {report['dtype']}")
    figure.savefig(path, dpi=120)
