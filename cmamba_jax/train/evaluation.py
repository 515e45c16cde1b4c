"""Runs a model over a split and scores it."""

import dataclasses
from collections.abc import Callable, Iterable

import jax
import numpy as np

from cmamba_jax import metrics
from cmamba_jax.batch import Batch
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
        total, count, logits, labels = 0.0, 0.0, [], []
        for batch in batches:
            outputs = self._predict(params, batch)
            batch_total, batch_count = self._loss_sum(outputs, batch)
            valid = np.asarray(valid_predictions(self._task, batch))
            logits.append(np.asarray(outputs, np.float32)[valid])
            labels.append(np.asarray(batch.labels)[valid])
            total, count = total + float(batch_total), count + float(batch_count)
        logits, labels = np.concatenate(logits), np.concatenate(labels)
        scores = metrics.evaluate(self._task, logits, labels, self._config)
        return Evaluation({"loss": total / max(count, 1)} | scores, logits, labels)
