"""Runs a model over a split and scores it."""

import dataclasses
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from cmamba_jax import metrics
from cmamba_jax.batch import Array, Batch
from cmamba_jax.config import EvaluationConfig, TaskConfig
from cmamba_jax.train.objective import valid_predictions
from cmamba_jax.train.state import LossSum, Params


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The score of a split and what it was computed from.

    Attributes:
        metrics: ``loss`` and the metrics by name.
        logits: outputs of the n predictions that count, float32 [n, K], in the order of the split; for a task per
            step, those of a sequence follow each other.
        labels: their labels, [n] or [n, K].
    """

    metrics: dict[str, float]
    logits: np.ndarray
    labels: np.ndarray


class Evaluator:
    """Scores parameters on batches; compiled once.

    Args:
        predict: from `state.make_predict_step`.
        loss_sum: function of the logits and the batch, see `objective.loss_sum`.
        task: the task.
        config: which metrics.
    """

    def __init__(
        self,
        predict: Callable[[Params, Batch], jax.Array],
        loss_sum: LossSum,
        task: TaskConfig,
        config: EvaluationConfig = EvaluationConfig(),  # noqa: B008 (frozen)
    ):
        self._predict = predict
        self._task = task
        self._config = config
        self._loss_sum = jax.jit(loss_sum)

    def __call__(self, params: Params, batches: Iterable[Batch]) -> Evaluation:
        """Scores all batches as one set: neither filler rows nor the size of the batches matter."""
        tally = _Tally(self._loss_sum, self._task, self._config)
        for batch in batches:
            tally.add(self._predict(params, batch), batch)
        return tally.result()

    def each(self, params: Params, batches: Iterable[Batch], n: int) -> list[Evaluation]:
        """Scores n models at once: `params` and what `predict` returns have a leading axis n."""
        tallies = [_Tally(self._loss_sum, self._task, self._config) for _ in range(n)]
        for batch in batches:
            outputs = np.asarray(self._predict(params, batch))
            for tally, logits in zip(tallies, outputs, strict=True):
                tally.add(logits, batch)
        return [tally.result() for tally in tallies]


class _Tally:
    """Loss, logits and labels of the batches so far."""

    def __init__(self, loss_sum: LossSum, task: TaskConfig, config: EvaluationConfig):
        self._loss_sum, self._task, self._config = loss_sum, task, config
        self._total, self._count = 0.0, 0.0
        self._logits: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []

    def add(self, outputs: Array, batch: Batch) -> None:
        total, count = self._loss_sum(jnp.asarray(outputs), batch)
        valid = np.asarray(valid_predictions(self._task, batch))
        self._logits.append(np.asarray(outputs, np.float32)[valid])
        self._labels.append(np.asarray(batch.labels)[valid])
        self._total, self._count = self._total + float(total), self._count + float(count)

    def result(self) -> Evaluation:
        logits, labels = np.concatenate(self._logits), np.concatenate(self._labels)
        loss = {"loss": self._total / max(self._count, 1)}
        return Evaluation(loss | metrics.evaluate(self._task, logits, labels, self._config), logits, labels)
