"""Host overhead of a training step: the package's against a hand-written one, at sizes where computing is cheap."""

import dataclasses
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from cmamba_jax.batch import Batch
from cmamba_jax.config import ModelConfig, OptimizerConfig, TaskConfig, TrainConfig
from cmamba_jax.models import CoupledMamba
from cmamba_jax.results import records
from cmamba_jax.train import optimizer, state
from cmamba_jax.train.compilation import jit
from cmamba_jax.train.objective import make_loss_sum

_MODEL = ModelConfig(d_model=8, d_state=4, n_layers=3, head_hidden=8)
_FEATURES = {"text": 4, "audio": 3, "vision": 2}
_TASK = TaskConfig(kind="classification", n_outputs=3)
_OPTIMIZER = OptimizerConfig(schedule="constant")
_BATCH_SIZE, _LENGTH = 2, 4


@dataclasses.dataclass(frozen=True)
class Options:
    """Compare the package's training step with a hand-written `jax.jit` step over the same dict of parameters."""

    steps: int = 200
    """Steps of each; the two take turns."""
    output: pathlib.Path = pathlib.Path("runs/bench")
    """Folder for step.json."""
    json: bool = False
    """Print one JSON object instead of a table."""


def main(args: list[str]) -> None:
    """Runs `cmamba bench step`.

    Args:
        args: words after ``step``.
    """
    options = tyro.cli(Options, args=args, prog="cmamba bench step")
    result = records.describe("step", ["bench", "step", *args]) | measure(options.steps)
    records.save(result, options.output)
    if options.json:
        print(json.dumps(result, indent=2))
        return
    print(f"training step of {result['arrays']} parameter arrays, median of {options.steps}")
    print(f"{'':<14}{'call returns':>14}{'result ready':>14}")
    for name in ("package", "hand_written"):
        call, ready = (result[name][part] for part in ("call_ms", "ready_ms"))
        print(f"{name.replace('_', '-'):<14}{call:>11.3f} ms{ready:>11.3f} ms")
    print(f"{'ratio':<14}{result['call_ratio']:>11.2f}   {result['ready_ratio']:>11.2f}")


def measure(steps: int) -> dict[str, Any]:
    """Medians over `steps` steps of both, in milliseconds, and their ratios.

    Returns:
        "package" and "hand_written" with "call_ms" (until the call returns: the host's work), "ready_ms" (until the
        result is there) and "loss" (of the fifth step: equal, since both do the same; Adam lets rounding grow, and on
        some processors they differ from the eighth on); "call_ratio" and "ready_ratio", package over hand-written;
        "arrays", the number of parameter arrays.
    """
    batch = _batch()
    contenders = {"package": _package(), "hand_written": _hand_written()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    losses: dict[str, float] = {}
    for i in range(steps + 10):
        for name, (step, carry) in contenders.items():
            start = time.perf_counter()
            carry, metrics = step(carry, batch)
            returned = time.perf_counter()
            jax.block_until_ready((carry, metrics))
            ready = time.perf_counter()
            if i == 4:
                losses[name] = float(getattr(metrics, "loss", metrics))
            contenders[name] = step, carry
            if i >= 10:  # The first ones compile and warm up.
                times[name].append((1e3 * (returned - start), 1e3 * (ready - start)))
    result: dict[str, Any] = {}
    for name, values in times.items():
        call, ready = (statistics.median(column) for column in zip(*values, strict=True))
        result[name] = {"call_ms": call, "ready_ms": ready, "loss": losses[name]}
    for part in ("call", "ready"):
        result[f"{part}_ratio"] = result["package"][f"{part}_ms"] / result["hand_written"][f"{part}_ms"]
    return result | {"arrays": len(jax.tree.leaves(_model()[1]))}


def _model() -> tuple[nnx.GraphDef, state.Params]:
    return state.split_model(CoupledMamba(_MODEL, features=_FEATURES, task=_TASK, rngs=nnx.Rngs(0)))


def _batch() -> Batch:
    rng = np.random.default_rng(0)
    return Batch(
        inputs={m: rng.normal(size=(_BATCH_SIZE, _LENGTH, f)).astype(np.float32) for m, f in _FEATURES.items()},
        mask={m: np.ones((_BATCH_SIZE, _LENGTH), bool) for m in _FEATURES},
        labels=np.arange(_BATCH_SIZE, dtype=np.int32) % _TASK.n_outputs,
        weight=np.ones(_BATCH_SIZE, np.float32),
    )


def _package() -> tuple[Callable, state.TrainState]:
    graphdef, params = _model()
    transformation = optimizer.make_optimizer(
        _OPTIMIZER, optimizer.make_schedule(_OPTIMIZER, steps_per_epoch=1, epochs=1)
    )
    step = state.make_train_step(graphdef, transformation, make_loss_sum(_TASK, TrainConfig()))
    return step, state.init_state(params, transformation, seed=0)


def _hand_written() -> tuple[Callable, tuple]:
    """The same update with nothing of the package but the model: cross entropy, clipping, L2 and Adam in place."""
    graphdef, params = _model()
    c = _OPTIMIZER

    def loss(params: state.Params, batch: Batch) -> jax.Array:
        logits = nnx.merge(graphdef, params)(batch).logits
        labels = jnp.asarray(batch.labels)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()

    def step(carry: tuple, batch: Batch) -> tuple[tuple, jax.Array]:
        params, first, second, count = carry
        value, grads = jax.value_and_grad(loss)(params, batch)
        norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(grads)))
        clip = jnp.minimum(1.0, (c.clip_norm or jnp.inf) / norm)
        grads = jax.tree.map(lambda g, p: g * clip + c.weight_decay * p, grads, params)
        first = jax.tree.map(lambda m, g: c.b1 * m + (1 - c.b1) * g, first, grads)
        second = jax.tree.map(lambda v, g: c.b2 * v + (1 - c.b2) * g * g, second, grads)
        count = count + 1
        fix1, fix2 = 1 - c.b1**count, 1 - c.b2**count
        params = jax.tree.map(
            lambda p, m, v: p - c.learning_rate * (m / fix1) / (jnp.sqrt(v / fix2) + 1e-8), params, first, second
        )
        return (params, first, second, count), value

    zeros = jax.tree.map(jnp.zeros_like, params)
    return jit(step, donate_argnums=0), (params, zeros, jax.tree.map(jnp.zeros_like, params), jnp.int32(0))
