import math

import numpy as np
import pytest

from cmamba_jax.config import TaskConfig
from cmamba_jax.metrics import METRICS, TASK_METRICS, evaluate

CLASSIFICATION = TaskConfig(kind="classification", n_outputs=3)
BINARY = TaskConfig(kind="classification", n_outputs=2)
REGRESSION = TaskConfig(kind="regression", n_outputs=1)
MULTILABEL = TaskConfig(kind="multilabel", n_outputs=3)


def one_hot(predicted, n_classes):
    return np.eye(n_classes, dtype=np.float32)[np.asarray(predicted)]


def test_every_task_metric_has_a_direction():
    assert {name for names in TASK_METRICS.values() for name in names} | {"loss"} == set(METRICS)


def test_classification_by_hand():
    # Class 0: tp 2, fp 1, fn 1 -> F1 2/3. Class 1: tp 1, fp 1, fn 0 -> 2/3. Class 2: tp 0, fn 1 -> 0.
    labels = np.array([0, 0, 0, 1, 2])
    values = evaluate(CLASSIFICATION, one_hot([0, 0, 1, 1, 0], 3), labels)
    assert values == pytest.approx({"accuracy": 3 / 5, "weighted_f1": (3 + 1) / 5 * 2 / 3, "macro_f1": 4 / 9})


def test_macro_f1_leaves_out_classes_that_occur_nowhere():
    assert evaluate(CLASSIFICATION, one_hot([0, 1], 3), np.array([0, 1]))["macro_f1"] == 1.0


def test_auc_is_the_share_of_ordered_pairs():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(40, 2)), rng.integers(0, 2, 40)
    score = logits[:, 1] - logits[:, 0]
    pairs = score[labels == 1][:, None] > score[labels == 0]
    assert evaluate(BINARY, logits, labels)["auc"] == pytest.approx(pairs.mean())


def test_auc_of_one_class_is_nan():
    values = evaluate(BINARY, one_hot([1, 0], 2), np.array([1, 1]))
    assert math.isnan(values["auc"]) and values["accuracy"] == 0.5


def test_regression_by_hand():
    values = evaluate(REGRESSION, np.array([[1.0], [2.0], [6.0]]), np.array([[1.0], [2.0], [3.0]]))
    assert values == pytest.approx({"mae": 1.0, "rmse": math.sqrt(3), "corr": 5 / math.sqrt(28)})


def test_regression_averages_over_targets():
    rng = np.random.default_rng(0)
    predicted, targets = rng.normal(size=(2, 30, 2)).astype(np.float32)
    both = evaluate(TaskConfig(kind="regression", n_outputs=2), predicted, targets)
    each = [evaluate(REGRESSION, predicted[:, k : k + 1], targets[:, k : k + 1]) for k in range(2)]
    assert both == pytest.approx({name: np.mean([values[name] for values in each]) for name in both})


@pytest.mark.parametrize("predicted", [[[2.0], [2.0]], [[2.0]]], ids=["constant", "single"])
def test_correlation_with_a_constant_is_nan(predicted):
    labels = np.arange(len(predicted), dtype=np.float64)[:, None]
    values = evaluate(REGRESSION, np.array(predicted), labels)
    assert math.isnan(values["corr"]) and math.isfinite(values["mae"])


def test_multilabel_by_hand():
    # Label 0: tp 1, fn 1 -> 2/3. Label 1: tp 1, fp 1 -> 2/3. Label 2 is neither present nor predicted.
    labels = np.array([[1, 1, 0], [1, 0, 0]], np.float32)
    logits = np.array([[3.0, 0.1, -1.0], [-0.1, 2.0, -2.0]])
    assert evaluate(MULTILABEL, logits, labels) == pytest.approx({"micro_f1": 4 / 6, "macro_f1": 2 / 3})


def test_multilabel_without_any_positive_is_nan():
    values = evaluate(MULTILABEL, np.full((2, 3), -1.0), np.zeros((2, 3)))
    assert all(math.isnan(value) for value in values.values())


@pytest.mark.parametrize("task", [CLASSIFICATION, BINARY, REGRESSION, MULTILABEL])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_logits_make_every_metric_nan(task, bad):
    n_outputs = task.n_outputs
    labels = np.zeros(4, int) if task.kind == "classification" else np.zeros((4, n_outputs))
    finite = np.ones((4, n_outputs))
    broken = finite.copy()
    broken[2, 0] = bad
    values = evaluate(task, broken, labels)
    assert values.keys() == evaluate(task, finite, labels).keys()
    assert all(math.isnan(value) for value in values.values())


def test_order_of_samples_does_not_matter():
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=(50, 3)), rng.integers(0, 3, 50)
    order = rng.permutation(50)
    assert evaluate(CLASSIFICATION, logits, labels) == pytest.approx(
        evaluate(CLASSIFICATION, logits[order], labels[order])
    )


def test_errors_name_the_shapes():
    with pytest.raises(ValueError, match=r"classification labels must have the shape \(4,\).*\(4, 3\)"):
        evaluate(CLASSIFICATION, np.zeros((4, 3)), np.zeros((4, 3), int))
    with pytest.raises(ValueError, match="no predictions"):
        evaluate(REGRESSION, np.zeros((0, 1)), np.zeros((0, 1)))
