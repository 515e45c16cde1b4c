import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmamba_jax.batch import Batch
from cmamba_jax.config import TaskConfig, TrainConfig
from cmamba_jax.errors import UserError
from cmamba_jax.train.objective import LOSSES, loss_sum, make_loss_sum, resolve_loss, valid_predictions

B, L, K = 5, 4, 3
CASES = [(kind, loss, per) for kind, losses in LOSSES.items() for loss in losses for per in ("sequence", "step")]


def make(kind: str, per: str, seed: int = 0) -> tuple[TaskConfig, np.ndarray, Batch]:
    rng = np.random.default_rng(seed)
    lead = (B,) if per == "sequence" else (B, L)
    labels = {
        "classification": rng.integers(0, K, lead),
        "regression": rng.normal(size=(*lead, K)),
        "multilabel": rng.integers(0, 2, (*lead, K)).astype(np.float32),
    }[kind]
    batch = Batch(
        inputs={"a": np.zeros((B, L, 2), np.float32), "b": np.zeros((B, L, 1), np.float32)},
        mask={"a": rng.random((B, L)) < 0.5, "b": rng.random((B, L)) < 0.5},
        labels=labels,
        weight=np.array([1, 1, 1, 1, 0], np.float32),
        label_mask=(rng.random((B, L)) < 0.6) if per == "step" else None,
    )
    return TaskConfig(kind=kind, n_outputs=K, per=per), rng.normal(size=(*lead, K)).astype(np.float32), batch


def one_loss(loss: str, logits: np.ndarray, label) -> float:
    """The loss of one prediction, straight from its definition."""
    if loss == "cross_entropy":
        return float(np.log(np.exp(logits).sum()) - logits[label])
    if loss == "bce":
        p = 1 / (1 + np.exp(-logits))
        return float(-(label * np.log(p) + (1 - label) * np.log(1 - p)).mean())
    error = logits - label
    return float(np.abs(error).mean() if loss == "l1" else (error**2).mean())


@pytest.mark.parametrize(("kind", "loss", "per"), CASES)
def test_sum_over_the_predictions_that_count(kind, loss, per):
    task, logits, batch = make(kind, per)
    if per == "sequence":
        rows = [(b,) for b in range(B - 1)]
    else:
        rows = [(b, l) for b in range(B - 1) for l in range(L) if batch.label_mask[b, l]]
    expected = sum(one_loss(loss, logits[row], batch.labels[row]) for row in rows)
    total, count = loss_sum(jnp.asarray(logits), batch, task=task, loss=loss)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert count == len(rows) and total.dtype == jnp.float32


@pytest.mark.parametrize(("kind", "loss", "per"), CASES)
def test_filler_rows_and_excluded_labels_change_nothing(kind, loss, per):
    task, logits, batch = make(kind, per)
    valid = np.asarray(valid_predictions(task, batch))
    garbage = np.array(batch.labels, copy=True)
    garbage[~valid] = -7 if kind == "classification" else np.nan
    other = dataclasses.replace(batch, labels=garbage)

    def mean(logits, batch):
        total, count = loss_sum(logits, batch, task=task, loss=loss)
        return total / count

    value, gradient = jax.value_and_grad(mean)(jnp.asarray(logits), batch)
    value2, gradient2 = jax.value_and_grad(mean)(jnp.asarray(logits), other)
    np.testing.assert_array_equal(value, value2)
    np.testing.assert_array_equal(gradient, gradient2)
    assert not np.asarray(gradient)[~valid].any()


def test_a_batch_with_filler_equals_the_batch_without():
    task, logits, batch = make("classification", "sequence")
    whole = loss_sum(jnp.asarray(logits), batch, task=task, loss="cross_entropy")
    real = Batch(
        inputs={m: x[:-1] for m, x in batch.inputs.items()}, labels=batch.labels[:-1], weight=batch.weight[:-1]
    )
    assert whole == loss_sum(jnp.asarray(logits[:-1]), real, task=task, loss="cross_entropy")


def test_without_label_mask_a_step_counts_where_any_modality_exists():
    task, _, batch = make("regression", "step")
    batch = dataclasses.replace(batch, label_mask=None)
    expected = (batch.mask["a"] | batch.mask["b"]) & (batch.weight > 0)[:, None]
    np.testing.assert_array_equal(valid_predictions(task, batch), expected)
    everything = dataclasses.replace(batch, mask=None, weight=None)
    assert np.asarray(valid_predictions(task, everything)).all()


def test_label_smoothing_moves_probability_to_all_classes():
    task, logits, batch = make("classification", "sequence")
    smooth = 0.3
    plain, count = loss_sum(jnp.asarray(logits), batch, task=task, loss="cross_entropy")
    smoothed, _ = make_loss_sum(task, TrainConfig(label_smoothing=smooth))(jnp.asarray(logits), batch)
    log_p = np.asarray(jax.nn.log_softmax(logits))[:-1]
    np.testing.assert_allclose(smoothed, (1 - smooth) * plain - smooth * log_p.mean(1).sum(), rtol=1e-5)


def test_auto_and_losses_that_do_not_fit():
    regression, classes = TaskConfig(kind="regression"), TaskConfig(kind="classification", n_outputs=2)
    assert resolve_loss(regression, TrainConfig()) == "l1"
    assert resolve_loss(regression, TrainConfig(loss="mse")) == "mse"
    assert resolve_loss(classes, TrainConfig()) == "cross_entropy"
    with pytest.raises(UserError, match="'bce' does not fit regression; choose auto, l1, mse"):
        resolve_loss(regression, TrainConfig(loss="bce"))
    with pytest.raises(UserError, match="label_smoothing is for classification"):
        resolve_loss(regression, TrainConfig(label_smoothing=0.1))
