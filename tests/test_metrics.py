import math

import numpy as np
import pytest

from cmamba_jax.config import EvaluationConfig, TaskConfig
from cmamba_jax.errors import UserError
from cmamba_jax.metrics import METRIC_SETS, METRICS, TASK_METRICS, decide, evaluate, metric_names

CLASSIFICATION = TaskConfig(kind="classification", n_outputs=3)
BINARY = TaskConfig(kind="classification", n_outputs=2)
REGRESSION = TaskConfig(kind="regression", n_outputs=1)
MULTILABEL = TaskConfig(kind="multilabel", n_outputs=3)


def one_hot(predicted, n_classes):
    return np.eye(n_classes, dtype=np.float32)[np.asarray(predicted)]


def test_every_task_metric_has_a_direction():
    sets = [*TASK_METRICS.values(), *METRIC_SETS.values()]
    assert {name for names in sets for name in names} | {"loss"} == set(METRICS)


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


MOSI, SIMS, MMSA, OMICS = (EvaluationConfig(name) for name in ("mosi", "sims", "mmsa_classification", "omics"))


def weighted_f1(true, predicted):
    """From its definition: F1 of each class, weighted by the class's share of the true labels."""
    total = 0.0
    for label in set(true):
        both = sum(t == p == label for t, p in zip(true, predicted, strict=True))
        total += true.count(label) / len(true) * 2 * both / (true.count(label) + predicted.count(label))
    return total


def accuracy(true, predicted):
    return sum(t == p for t, p in zip(true, predicted, strict=True)) / len(true)


def sentiment(n=200, bound=3.0):
    """Labels as annotators give them, some of them zero; predictions around them that go beyond the bounds."""
    rng = np.random.default_rng(0)
    labels = np.round(rng.uniform(-bound, bound, n) * 5) / 5
    labels[:10] = 0
    return (labels + rng.normal(size=n) * bound / 2).astype(np.float32)[:, None], labels.astype(np.float32)[:, None]


def test_mosi_by_its_definition():
    predicted, labels = sentiment()
    values = evaluate(REGRESSION, predicted, labels, MOSI)
    pairs = list(zip(labels[:, 0].tolist(), predicted[:, 0].tolist(), strict=True))
    has0 = [[x >= 0 for x in column] for column in zip(*pairs, strict=True)]
    non0 = [[x > 0 for x in column] for column in zip(*(pair for pair in pairs if pair[0] != 0), strict=True)]
    expected = {
        "mae": sum(abs(t - p) for t, p in pairs) / len(pairs),
        "corr": np.corrcoef(np.array(pairs).T)[0, 1],
        "has0_acc2": accuracy(*has0),
        "has0_f1": weighted_f1(*has0),
        "non0_acc2": accuracy(*non0),
        "non0_f1": weighted_f1(*non0),
    }
    for bound in (1, 2, 3):
        # Python's round goes to even numbers at one half, as numpy's does.
        classes = [[round(min(max(x, -bound), bound)) for x in column] for column in zip(*pairs, strict=True)]
        expected[f"acc{2 * bound + 1}"] = accuracy(*classes)
    assert values == pytest.approx(expected) and list(values) == list(METRIC_SETS["mosi"])
    assert len({round(value, 6) for value in values.values()}) == len(values)


def test_sims_by_its_definition():
    predicted, labels = sentiment(bound=1.0)
    labels[:4, 0], predicted[:4, 0] = [0.1, -0.1, 0.7, -0.7], [0.1, -0.1, 0.7, -0.7]  # On the edges.
    labels[4, 0], predicted[4, 0] = 0.1, np.nextafter(np.float32(0.1), np.float32(1))
    values = evaluate(REGRESSION, predicted, labels, SIMS)

    def interval(x, edges):
        return sum(x > np.float32(edge) for edge in edges)

    clipped = [[min(max(x, np.float32(-1)), np.float32(1)) for x in column[:, 0]] for column in (labels, predicted)]
    expected = {}
    for name, edges in {"acc2": [0], "acc3": [-0.1, 0.1], "acc5": [-0.7, -0.1, 0.1, 0.7]}.items():
        classes = [[interval(x, edges) for x in column] for column in clipped]
        expected[name] = accuracy(*classes)
        if name == "acc2":
            expected["weighted_f1"] = weighted_f1(*classes)
    expected["mae"] = np.mean(np.abs(np.subtract(*clipped, dtype=np.float64)))
    expected["corr"] = np.corrcoef(clipped)[0, 1]
    assert values == pytest.approx(expected, rel=1e-6) and list(values) == list(METRIC_SETS["sims"])
    assert values["mae"] < evaluate(REGRESSION, predicted, labels)["mae"], "predictions beyond the bounds are clipped"


def test_mmsa_classification_sound_and_literal():
    labels = np.array([0, 0, 2, 2, 2, 1])
    logits = np.array([[3, 0, 1], [0, 5, 1], [0, 0, 1], [0, 9, 1], [1, 0, 0], [0, 1, 2.0]])
    values = evaluate(TaskConfig("classification", 3), logits, labels, MMSA)
    # By classes the predictions are 0 1 2 1 0 2; positive against negative: no, yes, yes, yes, no, yes.
    three = labels.tolist(), [0, 1, 2, 1, 0, 2]
    has0 = [0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 0, 1]
    non0 = [0, 0, 1, 1, 1], [0, 1, 1, 1, 0]
    literal = [0, 0, 2, 2, 2], [0, 1, 1, 1, 0]
    expected = {"acc3": accuracy(*three), "weighted_f1": weighted_f1(*three)}
    for name, pair in {"has0": has0, "non0": non0, "mmsa_non0": literal}.items():
        expected |= {f"{name}_acc2": accuracy(*pair), f"{name}_f1": weighted_f1(*pair)}
    assert values == pytest.approx(expected)
    assert values["mmsa_non0_acc2"] == 1 / 5, "every positive sample counts as wrong"


def test_omics_of_two_and_of_more_classes():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(40, 2)), rng.integers(0, 2, 40)
    values = evaluate(BINARY, logits, labels, OMICS)
    both = np.sum(labels & (logits.argmax(1) == 1))
    assert values["f1"] == pytest.approx(2 * both / (labels.sum() + logits.argmax(1).sum()))
    assert values["auc"] == evaluate(BINARY, logits, labels)["auc"]
    assert metric_names(CLASSIFICATION, OMICS) == ("accuracy", "weighted_f1", "macro_f1")


def test_scores_that_do_not_exist_are_nan():
    zeros = np.zeros((3, 1))
    values = evaluate(REGRESSION, zeros + 0.5, zeros, MOSI)
    assert math.isnan(values["non0_acc2"]) and math.isnan(values["corr"]) and values["has0_acc2"] == 1
    values = evaluate(CLASSIFICATION, np.eye(3), np.ones(3, int), MMSA)
    assert math.isnan(values["non0_f1"]) and math.isnan(values["mmsa_non0_acc2"])
    assert all(math.isnan(value) for value in evaluate(REGRESSION, zeros * np.nan, zeros, SIMS).values())


def test_thresholds_decide_which_labels_are_predicted():
    logits = np.log(np.array([[0.2, 0.7], [0.4, 0.9]]) / (1 - np.array([[0.2, 0.7], [0.4, 0.9]])))
    np.testing.assert_array_equal(decide(logits, (0.5,)), [[False, True], [False, True]])
    np.testing.assert_array_equal(decide(logits, (0.3, 0.8)), [[False, False], [True, True]])
    task, labels = TaskConfig("multilabel", 2), np.array([[0, 0], [1, 1]])
    assert evaluate(task, logits, labels)["micro_f1"] == 0.5
    assert evaluate(task, logits, labels, EvaluationConfig(thresholds=(0.3, 0.8)))["micro_f1"] == 1


@pytest.mark.parametrize(
    ("task", "config", "message"),
    [
        (BINARY, MOSI, "'mosi' needs regression with one output, but the task is classification"),
        (TaskConfig("regression", 2), SIMS, "'sims' needs regression with one output"),
        (BINARY, MMSA, "needs classification as negative, neutral or positive"),
        (MULTILABEL, OMICS, "'omics' needs classification"),
        (MULTILABEL, EvaluationConfig(thresholds=(0.1, 0.2)), "one for each of the 3 labels"),
        (MULTILABEL, EvaluationConfig(thresholds=(0.0,)), "expected probabilities between 0 and 1"),
    ],
)
def test_metrics_that_do_not_fit_the_task(task, config, message):
    with pytest.raises(UserError, match=message):
        metric_names(task, config)
