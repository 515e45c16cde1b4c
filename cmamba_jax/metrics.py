"""Metrics: pure functions of predictions and labels."""

import math
import warnings
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Integer, Shaped
from scipy import special, stats
from sklearn import metrics as sklearn_metrics

from cmamba_jax.config import EvaluationConfig, TaskConfig, TaskKind
from cmamba_jax.errors import UserError

METRICS: dict[str, Literal["min", "max"]] = {
    "loss": "min",
    "accuracy": "max",
    "weighted_f1": "max",
    "macro_f1": "max",
    "micro_f1": "max",
    "f1": "max",
    "auc": "max",
    "mae": "min",
    "rmse": "min",
    "corr": "max",
    "has0_acc2": "max",
    "has0_f1": "max",
    "non0_acc2": "max",
    "non0_f1": "max",
    "acc2": "max",
    "acc3": "max",
    "acc5": "max",
    "acc7": "max",
    "mmsa_non0_acc2": "max",
    "mmsa_non0_f1": "max",
}
"""Every metric's name, and whether its smallest or its largest value is the best."""

TASK_METRICS: dict[TaskKind, tuple[str, ...]] = {
    "classification": ("accuracy", "weighted_f1", "macro_f1", "auc"),
    "regression": ("mae", "rmse", "corr"),
    "multilabel": ("micro_f1", "macro_f1"),
}
"""The metrics of each kind of task, the main one first. `auc` exists for two classes only."""

_BINARY = ("has0_acc2", "has0_f1", "non0_acc2", "non0_f1")
METRIC_SETS: dict[str, tuple[str, ...]] = {
    "mosi": ("mae", "corr", *_BINARY, "acc3", "acc5", "acc7"),
    "sims": ("acc2", "acc3", "acc5", "weighted_f1", "mae", "corr"),
    "mmsa_classification": ("acc3", "weighted_f1", *_BINARY, "mmsa_non0_acc2", "mmsa_non0_f1"),
    "omics": ("accuracy", "f1", "auc", "weighted_f1", "macro_f1"),
}
"""The metrics of each protocol of `EvaluationConfig.metrics`, the main one first; see `evaluate`."""

_SIMS_EDGES = {"acc2": (0.0,), "acc3": (-0.1, 0.1), "acc5": (-0.7, -0.1, 0.1, 0.7)}
_AUTO = EvaluationConfig()


def metric_names(task: TaskConfig, config: EvaluationConfig = _AUTO) -> tuple[str, ...]:
    """The metrics that `evaluate` gives, the main one first.

    Raises:
        UserError: the set of metrics or the thresholds do not fit the task.
    """
    _check(task, config)
    names = TASK_METRICS[task.kind] if config.metrics == "auto" else METRIC_SETS[config.metrics]
    if task.kind == "classification" and task.n_outputs != 2:
        names = tuple(name for name in names if name not in ("f1", "auc"))
    return names


def _check(task: TaskConfig, config: EvaluationConfig) -> None:
    needs = {
        "mosi": ("regression with one output", task.kind == "regression" and task.n_outputs == 1),
        "sims": ("regression with one output", task.kind == "regression" and task.n_outputs == 1),
        "mmsa_classification": (
            "classification as negative, neutral or positive",
            task.kind == "classification" and task.n_outputs == 3,
        ),
        "omics": ("classification", task.kind == "classification"),
    }
    wanted, fits = needs.get(config.metrics, ("", True))
    if not fits:
        raise UserError(
            f"evaluation.metrics {config.metrics!r} needs {wanted}, but the task is {task.kind} with {task.n_outputs} "
            "outputs; set it to auto"
        )
    n_thresholds = (1, task.n_outputs) if task.kind == "multilabel" else (len(config.thresholds),)
    if len(config.thresholds) not in n_thresholds or not all(0 < t < 1 for t in config.thresholds):
        raise UserError(
            f"evaluation.thresholds is {config.thresholds}, expected probabilities between 0 and 1: one, or one for "
            f"each of the {task.n_outputs} labels"
        )


def decide(logits: Float[np.ndarray, "*n K"], thresholds: Sequence[float]) -> Bool[np.ndarray, "*n K"]:
    """Which labels are predicted (multilabel): those whose probability is above the threshold, one for all or each."""
    return logits > special.logit(np.asarray(thresholds))


def evaluate(
    task: TaskConfig,
    logits: Float[np.ndarray, "n K"],
    labels: Shaped[np.ndarray, "n ..."],
    config: EvaluationConfig = _AUTO,
) -> dict[str, float]:
    """Scores n predictions; predictions per step are flattened to one row for each step that counts.

    A metric that is undefined is NaN, never an error: the area under the ROC curve when only one class occurs,
    the correlation with a constant, an F1 score without a positive label or prediction, a score of the samples whose
    label is not zero when there are none. Logits that are not finite make every metric NaN.

    The sets "mosi", "sims" and "mmsa_classification" are those of MMSA (github.com/thuiar/MMSA), on which the tables
    of the paper rest; all F1 scores in them are weighted by the frequencies of the classes.

    Args:
        task: kind of the target.
        logits: outputs of the model, float [n, K].
        labels: classification int [n]; regression float [n, K]; multilabel 0/1 [n, K].
        config: which metrics, and the thresholds of the labels.

    Returns:
        The metrics by name, in the order of `metric_names`.

        With "auto", classification: accuracy; F1 per class, averaged with the classes' frequencies (`weighted_f1`) or
        equally over the classes that occur in the labels or the predictions (`macro_f1`); for K = 2 the area under
        the ROC curve (`auc`).
        Regression: mean absolute error, root mean squared error (in units of the target) and Pearson's
        correlation, each averaged over the K targets.
        Multilabel: a label is predicted where its probability is above the threshold; F1 over all decisions
        (`micro_f1`) or averaged over the labels that occur or are predicted (`macro_f1`).

        "mosi" (CMU-MOSI and CMU-MOSEI, sentiment -3..3): `mae`, `corr`; accuracy and F1 of y >= 0 against y < 0 over
        all samples (`has0_*`) and of y > 0 over the samples whose label is not 0 (`non0_*`); the accuracy of the
        integer nearest to y clipped to +-1, +-2, +-3 (`acc3`, `acc5`, `acc7`).
        "sims" (CH-SIMS, CH-SIMSv2): predictions and labels are clipped to +-1; accuracy over two, three and five
        intervals, each with its upper edge (edges 0; +-0.1; +-0.1 and +-0.7); `weighted_f1` of the two; MAE and
        correlation after the clipping.
        "mmsa_classification" (0 negative, 1 neutral, 2 positive): `acc3` and `weighted_f1` of the three classes;
        positive against the rest (`has0_*`) or against negative without the neutral samples (`non0_*`), each decided
        by the larger of the outputs for positive and negative. `mmsa_non0_*` are MMSA's own values of the last two:
        it compares decisions in {0, 1} with labels in {0, 2}, so that every positive sample counts as wrong. Tables
        3, 4 and 13 of the paper hold these; they compare with nothing else.
        "omics": accuracy, `weighted_f1`, `macro_f1`; for K = 2 also the F1 of class 1 (`f1`) and `auc`.

    Raises:
        UserError: the metrics do not fit the task.
        ValueError: there are no predictions, or the labels' shape does not fit the task and the logits.

    Example:
        >>> task = TaskConfig(kind="regression")
        >>> evaluate(task, np.array([[0.0], [2.0]]), np.array([[1.0], [3.0]]))
        {'mae': 1.0, 'rmse': 1.0, 'corr': 1.0}
        >>> scores = evaluate(task, np.array([[0.4], [2.0]]), np.array([[0.0], [3.0]]), EvaluationConfig("mosi"))
        >>> scores["acc3"], scores["acc7"]
        (1.0, 0.5)
    """
    n, n_outputs = logits.shape
    expected = (n,) if task.kind == "classification" else (n, n_outputs)
    if n == 0:
        raise ValueError("there are no predictions to score: the split is empty, or its masks leave no step to predict")
    if labels.shape != expected:
        raise ValueError(
            f"{task.kind} labels must have the shape {expected} for logits {logits.shape}, not {labels.shape}"
        )
    names = metric_names(task, config)
    if not np.isfinite(logits).all():
        return dict.fromkeys(names, math.nan)
    match config.metrics:
        case "mosi":
            values = _mosi(logits[:, 0].astype(np.float64), labels[:, 0].astype(np.float64))
        case "sims":
            values = _sims(logits[:, 0].astype(np.float32), labels[:, 0].astype(np.float32))
        case "mmsa_classification":
            values = _mmsa_classification(logits, labels)
        case _ if task.kind == "multilabel":
            values = _multilabel(decide(logits, config.thresholds), labels > 0.5)
        case _:
            score = {"classification": _classification, "regression": _regression}[task.kind]
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
        values["f1"] = _f1(labels, predicted, "binary")
        values["auc"] = math.nan if one_class else sklearn_metrics.roc_auc_score(labels, logits[:, 1] - logits[:, 0])
    return values


def _regression(logits: Float[np.ndarray, "n K"], labels: Float[np.ndarray, "n K"]) -> dict[str, float]:
    labels = labels.astype(np.float64)
    return {
        "mae": sklearn_metrics.mean_absolute_error(labels, logits),
        "rmse": sklearn_metrics.root_mean_squared_error(labels, logits),
        "corr": np.mean([_pearson(p, y) for p, y in zip(logits.T, labels.T, strict=True)]),
    }


def _multilabel(predicted: Bool[np.ndarray, "n K"], true: Bool[np.ndarray, "n K"]) -> dict[str, float]:
    return {"micro_f1": _f1(true, predicted, "micro"), "macro_f1": _f1(true, predicted, "macro")}


def _mosi(predicted: Float[np.ndarray, " n"], true: Float[np.ndarray, " n"]) -> dict[str, float]:
    def rounded_accuracy(bound: int) -> float:
        same = np.round(np.clip(predicted, -bound, bound)) == np.round(np.clip(true, -bound, bound))
        return float(np.mean(same))

    non0 = true != 0
    return {
        **_errors(predicted, true),
        **_binary("has0", true >= 0, predicted >= 0),
        **_binary("non0", true[non0] > 0, predicted[non0] > 0),
        **{f"acc{2 * bound + 1}": rounded_accuracy(bound) for bound in (1, 2, 3)},
    }


def _sims(predicted: Float[np.ndarray, " n"], true: Float[np.ndarray, " n"]) -> dict[str, float]:
    predicted, true = np.clip(predicted, -1, 1), np.clip(true, -1, 1)
    # In float32 on both sides, so that a label of 0.1 lies on the edge 0.1, not beside it.
    classes = {
        name: [np.digitize(x, np.asarray(edges, np.float32), right=True) for x in (true, predicted)]
        for name, edges in _SIMS_EDGES.items()
    }
    true2, predicted2 = classes["acc2"]
    return {
        **{name: float(np.mean(a == b)) for name, (a, b) in classes.items()},
        "weighted_f1": _f1(true2, predicted2, "weighted"),
        **_errors(predicted.astype(np.float64), true.astype(np.float64)),
    }


def _mmsa_classification(logits: Float[np.ndarray, "n K"], labels: Integer[np.ndarray, " n"]) -> dict[str, float]:
    predicted, positive = logits.argmax(axis=1), logits[:, 2] > logits[:, 0]
    non0 = labels != 1
    return {
        "acc3": np.mean(predicted == labels),
        "weighted_f1": _f1(labels, predicted, "weighted"),
        **_binary("has0", labels > 1, positive),
        **_binary("non0", labels[non0] > 1, positive[non0]),
        **_binary("mmsa_non0", labels[non0], positive[non0].astype(int)),
    }


def _binary(prefix: str, true: Shaped[np.ndarray, " n"], predicted: Shaped[np.ndarray, " n"]) -> dict[str, float]:
    if not len(true):
        return {f"{prefix}_acc2": math.nan, f"{prefix}_f1": math.nan}
    return {f"{prefix}_acc2": np.mean(true == predicted), f"{prefix}_f1": _f1(true, predicted, "weighted")}


def _errors(predicted: Float[np.ndarray, " n"], true: Float[np.ndarray, " n"]) -> dict[str, float]:
    return {"mae": sklearn_metrics.mean_absolute_error(true, predicted), "corr": _pearson(predicted, true)}


def _f1(true: np.ndarray, predicted: np.ndarray, average: Literal["micro", "macro", "weighted", "binary"]) -> float:
    return sklearn_metrics.f1_score(true, predicted, average=average, zero_division=np.nan)


def _pearson(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> float:
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.NearConstantInputWarning)
        return stats.pearsonr(x, y).statistic
