"""The training loop."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from cmamba_jax.batch import Batch
from cmamba_jax.config import EvaluationConfig, TaskConfig, TrainConfig
from cmamba_jax.errors import UserError
from cmamba_jax.metrics import METRICS, metric_names
from cmamba_jax.train.checkpoint import Checkpoints, Position
from cmamba_jax.train.preemption import Preempted
from cmamba_jax.train.profile import Profiler
from cmamba_jax.train.state import Params, StepMetrics, TrainState, parameter_names
from cmamba_jax.train.writers import MetricWriter, Progress, Silence

CURE = "lower optimizer.learning_rate, set optimizer.clip_norm, or look for extreme values in the data"


@runtime_checkable
class Batches(Protocol):
    """An infinite iterator of batches whose state can be read: a grain iterator."""

    def __next__(self) -> Batch: ...

    def get_state(self) -> Any:
        """A JSON value; setting it on an equal iterator makes the same batches follow."""


class NonFiniteError(UserError):
    """The loss or the gradient became infinite or not a number."""


def check_monitor(name: str, task: TaskConfig, evaluation: EvaluationConfig) -> None:
    """Makes sure that a validation metric of this name will exist.

    Raises:
        UserError: it will not; lists those that will.
    """
    known = ["loss", *metric_names(task, evaluation)]
    if name not in known:
        raise UserError(f"train.monitor: unknown metric {name!r}; expected one of {', '.join(known)} ({task.kind})")


def train(
    state: TrainState,
    position: Position,
    *,
    config: TrainConfig,
    train_step: Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]],
    validate: Callable[[Params], Mapping[str, float]],
    batches: Batches,
    steps_per_epoch: int,
    batch_size: int,
    learning_rate: Callable[[int], float],
    checkpoints: Checkpoints,
    writer: MetricWriter | Silence,
    progress: Progress | Silence,
    preempted: Callable[[int], bool] = lambda step: False,
    profiler: Profiler | None = None,
) -> tuple[TrainState, Position]:
    """Trains until the last epoch or until early stopping.

    An epoch: steps, validation, the best checkpoint if the monitored metric improved, the last checkpoint.
    All that decides what comes next is in `state` and `position`, so that a run continued from its last checkpoint
    repeats an uninterrupted one bit for bit.

    Args:
        state: training state; donated.
        position: where the run stands; `Position()` for a new one.
        config: the training configuration.
        train_step: from `state.make_train_step`.
        validate: validation metrics of parameters.
        batches: training batches, already at `position`.
        steps_per_epoch: steps an epoch.
        batch_size: samples a step, for the throughput.
        learning_rate: rate of a step (counted from 1), for the records.
        checkpoints: where to save.
        writer: where the metrics go.
        progress: what the user sees.
        preempted: whether to save and stop after a step, see `preemption`.
        profiler: traces a few steps.

    Returns:
        The final state and position.

    Raises:
        Preempted: `preempted` said so; the state is saved.
        NonFiniteError: the loss, the gradient or the validation loss is not finite; names step and parameters.
    """
    while position.epoch < config.epochs and not stopped(position, config):
        epoch, started = position.epoch + 1, time.perf_counter()
        log = EpochLog(epoch, config.log_every, batch_size, learning_rate, writer, progress, position.losses)
        step, end = position.step, epoch * steps_per_epoch
        for step in range(position.step + 1, end + 1):
            with profiler.step(step) if profiler else contextlib.nullcontext():
                state, metrics = train_step(state, next(batches))
            log.add(step, metrics, state)
            if step < end and preempted(step):
                log.read(state)
                position = dataclasses.replace(position, step=step, data=batches.get_state(), losses=log.unwritten)
                checkpoints.save("last", state, position)
                raise Preempted(f"saved at step {step}")
        log.read(state, last=True)

        values = validate(state.params)
        if not math.isfinite(values["loss"]):
            raise NonFiniteError(f"the validation loss is {values['loss']} after epoch {epoch} (step {step}); {CURE}")
        improved = position.best_epoch == 0 or better(values[config.monitor], position.best_value, config.monitor)
        position = Position(
            step=step,
            epoch=epoch,
            best_epoch=epoch if improved else position.best_epoch,
            best_value=values[config.monitor] if improved else position.best_value,
            data=batches.get_state(),
        )
        seconds = time.perf_counter() - started
        writer.write(step, epoch, "valid", values, timing={"seconds": seconds})
        shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        progress.message(
            f"epoch {epoch}/{config.epochs}  train loss {log.mean_loss:.4f}  valid {shown}  "
            f"{seconds:.1f} s{'  (best)' if improved else ''}"
        )
        if improved:
            checkpoints.save("best", state, position)
        told = preempted(step)
        if told or epoch % config.checkpoint_every == 0 or epoch == config.epochs or stopped(position, config):
            checkpoints.save("last", state, position)
        if told:
            raise Preempted(f"saved at step {step}")
    return state, position


def stopped(position: Position, config: TrainConfig) -> bool:
    """Whether early stopping ends the run here."""
    return config.patience is not None and position.epoch - position.best_epoch >= config.patience


def better(value: float, best: float, metric: str) -> bool:
    """Whether a value of a metric beats the best so far; one that is undefined (NaN) is worse than any number."""
    if math.isnan(value) or math.isnan(best):
        return not math.isnan(value)
    return value < best if METRICS[metric] == "min" else value > best


class EpochLog:
    """Reads the metrics of the steps of one epoch, checks them, and writes the mean of every few.

    Args:
        epoch: its number, counted from 1.
        every: steps between two records.
        batch_size: samples a step.
        learning_rate: rate of a step.
        writer: where the records go.
        progress: what the user sees.
        losses: of the epoch so far that were not written, where it was interrupted.
    """

    def __init__(
        self,
        epoch: int,
        every: int,
        batch_size: int,
        learning_rate: Callable[[int], float],
        writer: MetricWriter | Silence,
        progress: Progress | Silence,
        losses: Iterable[float] = (),
    ):
        self._epoch, self._every, self._batch_size, self._learning_rate = epoch, every, batch_size, learning_rate
        self._writer, self._progress = writer, progress
        self._pending: tuple[int, StepMetrics] | None = None
        self._losses = list(losses)
        self._written, self._time = 0, time.perf_counter()

    @property
    def mean_loss(self) -> float:
        """Mean of the losses read so far."""
        return float(np.mean(self._losses))

    @property
    def unwritten(self) -> tuple[float, ...]:
        """Losses read since the last record."""
        return tuple(self._losses[self._written :])

    def add(self, step: int, metrics: StepMetrics, state: TrainState) -> None:
        """Takes the metrics of a step and reads those of the one before, while the device computes this one."""
        self.read(state)
        self._pending = (step, metrics)

    def read(self, state: TrainState, *, last: bool = False) -> None:
        """Waits for the metrics that are pending."""
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        loss, grad_norm = float(metrics.loss), float(metrics.grad_norm)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise NonFiniteError(_describe(step, self._epoch, metrics, state))
        self._losses.append(loss)
        self._progress.update(step, loss, self._batch_size)
        if last or step % self._every == 0:
            recent, now = self._losses[self._written :], time.perf_counter()
            values = {"loss": np.mean(recent), "grad_norm": grad_norm, "learning_rate": self._learning_rate(step)}
            timing = {"samples_per_second": len(recent) * self._batch_size / (now - self._time)}
            self._writer.write(step, self._epoch, "train", values, timing=timing)
            self._written, self._time = len(self._losses), now


def _describe(step: int, epoch: int, metrics: StepMetrics, state: TrainState) -> str:
    """Where a step broke. `state` may be a later one: the step's guard keeps the parameters from before it."""
    names = parameter_names(state.params)
    gradients = [n for n, square in zip(names, np.asarray(metrics.squares), strict=True) if not np.isfinite(square)]
    leaves = jax.tree.leaves(state.params)
    parameters = [n for n, leaf in zip(names, leaves, strict=True) if not bool(jnp.isfinite(leaf).all())]
    return (
        f"training stopped at step {step} (epoch {epoch}): the loss is {float(metrics.loss)}; "
        f"gradients not finite: {_listed(gradients)}; parameters not finite: {_listed(parameters)}; {CURE}"
    )


def _listed(names: list[str], shown: int = 5) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return (", ".join(names[:shown]) or "none") + more
