"""Metrics: pure functions of predictions and labels."""

import math
import warnings
from typing import Literal

import numpy as np
from jaxtyping import Float, Integer, Shaped
from scipy import stats
from sklearn import metrics as sklearn_metrics

from cmamba_jax.config import TaskConfig, TaskKind

METRICS: dict[str, Literal["min", "max"]] = {
    "loss": "min",
    "accuracy": "max",
    "weighted_f1": "max",
    "macro_f1": "max",
    "micro_f1": "max",
    "auc": "max",
    "mae": "min",
    "rmse": "min",
    "corr": "max",
}
"""Every metric's name, and whether its smallest or its largest value is the best."""

TASK_METRICS: dict[TaskKind, tuple[str, ...]] = {
    "classification": ("accuracy", "weighted_f1", "macro_f1", "auc"),
    "regression": ("mae", "rmse", "corr"),
    "multilabel": ("micro_f1", "macro_f1"),
}
"""The metrics of each kind of task, the main one first. `auc` exists for two classes only."""


def evaluate(
    task: TaskConfig, logits: Float[np.ndarray, "n K"], labels: Shaped[np.ndarray, "n ..."]
) -> dict[str, float]:
    """Scores n predictions; predictions per step are flattened to one row for each step that counts.

    A metric that is undefined is NaN, never an error: the area under the ROC curve when only one class occurs,
    the correlation with a constant, an F1 score without a positive label or prediction. Logits that are not
    finite make every metric NaN.

    Args:
        task: kind of the target.
        logits: outputs of the model, float [n, K].
        labels: classification int [n]; regression float [n, K]; multilabel 0/1 [n, K].

    Returns:
        The task's metrics by name, in the order of `TASK_METRICS`.
        classification: accuracy; F1 per class, averaged with the classes' frequencies (`weighted_f1`) or equally
        over the classes that occur in the labels or the predictions (`macro_f1`); for K = 2 the area under the ROC
        curve (`auc`).
        regression: mean absolute error, root mean squared error (in units of the target) and Pearson's
        correlation, each averaged over the K targets.
        multilabel: a label is predicted where its logit is positive (probability above 0.5); F1 over all decisions
        (`micro_f1`) or averaged over the labels that occur or are predicted (`macro_f1`).

    Raises:
        ValueError: there are no predictions, or the labels' shape does not fit the task and the logits.

    Example:
        >>> task = TaskConfig(kind="regression")
        >>> evaluate(task, np.array([[0.0], [2.0]]), np.array([[1.0], [3.0]]))
        {'mae': 1.0, 'rmse': 1.0, 'corr': 1.0}
    """
    n, n_outputs = logits.shape
    expected = (n,) if task.kind == "classification" else (n, n_outputs)
    if n == 0:
        raise ValueError("there are no predictions to score: the split is empty, or its masks leave no step to predict")
    if labels.shape != expected:
        raise ValueError(
            f"{task.kind} labels must have the shape {expected} for logits {logits.shape}, not {labels.shape}"
        )
    names = TASK_METRICS[task.kind]
    if task.kind == "classification" and n_outputs != 2:
        names = tuple(name for name in names if name != "auc")
    if not np.isfinite(logits).all():
        return dict.fromkeys(names, math.nan)
    score = {"classification": _classification, "regression": _regression, "multilabel": _multilabel}[task.kind]
    values = score(logits.astype(np.float64), labels)
    return {name: float(values[name]) for name in names}


def _classification(logits: Float[np.ndarray, "n K"], labels: Integer[np.ndarray, " n"]) -> dict[str, float]:
    predicted = logits.argmax(axis=1)
    values = {
        "accuracy": np.mean(predicted == labels),
        "weighted_f1": _f1(labels, predicted, "weighted"),
        "macro_f1": _f1(labels, predicted, "macro"),
    }
    if logits.shape[1] == 2:
        one_class = np.unique(labels).size < 2
        values["auc"] = math.nan if one_class else sklearn_metrics.roc_auc_score(labels, logits[:, 1] - logits[:, 0])
    return values


def _regression(logits: Float[np.ndarray, "n K"], labels: Float[np.ndarray, "n K"]) -> dict[str, float]:
    labels = labels.astype(np.float64)
    return {
        "mae": sklearn_metrics.mean_absolute_error(labels, logits),
        "rmse": sklearn_metrics.root_mean_squared_error(labels, logits),
        "corr": np.mean([_pearson(p, y) for p, y in zip(logits.T, labels.T, strict=True)]),
    }


def _multilabel(logits: Float[np.ndarray, "n K"], labels: Shaped[np.ndarray, "n K"]) -> dict[str, float]:
    true, predicted = labels > 0.5, logits > 0
    return {"micro_f1": _f1(true, predicted, "micro"), "macro_f1": _f1(true, predicted, "macro")}


def _f1(true: np.ndarray, predicted: np.ndarray, average: Literal["micro", "macro", "weighted"]) -> float:
    return sklearn_metrics.f1_score(true, predicted, average=average, zero_division=np.nan)


def _pearson(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> float:
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.NearConstantInputWarning)
        return stats.pearsonr(x, y).statistic
