"""The training objective: which predictions count, and what a wrong one costs."""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Bool, Float

from cmamba_jax.batch import Batch
from cmamba_jax.config import TaskConfig, TaskKind, TrainConfig
from cmamba_jax.errors import UserError

LossName = Literal["l1", "mse", "cross_entropy", "bce"]

LOSSES: dict[TaskKind, tuple[LossName, ...]] = {
    "classification": ("cross_entropy",),
    "regression": ("l1", "mse"),
    "multilabel": ("bce",),
}
"""The losses of each kind of task; the first is what ``auto`` means."""


def resolve_loss(task: TaskConfig, config: TrainConfig) -> LossName:
    """Name of the loss that `config` asks for.

    Raises:
        UserError: the loss or the label smoothing does not fit the task.
    """
    choices = LOSSES[task.kind]
    if config.loss not in ("auto", *choices):
        raise UserError(f"train.loss {config.loss!r} does not fit {task.kind}; choose {', '.join(('auto', *choices))}")
    if config.label_smoothing and task.kind != "classification":
        raise UserError(f"train.label_smoothing is for classification, the task is {task.kind}; set it to 0")
    return choices[0] if config.loss == "auto" else config.loss


def valid_predictions(task: TaskConfig, batch: Batch) -> Bool[jax.Array, "B *L"]:
    """Which predictions count: [B] for a task per sequence, [B, L] per step.

    Rows of weight 0 never count. A step counts where `label_mask` says so; without one, where any modality exists.
    """
    first = next(iter(batch.inputs.values()))
    rows = jnp.ones(first.shape[0], bool) if batch.weight is None else jnp.asarray(batch.weight) > 0
    if task.per == "sequence":
        return rows
    if batch.label_mask is not None:
        steps = jnp.asarray(batch.label_mask)
    elif batch.mask is not None:
        steps = jnp.stack([jnp.asarray(mask) for mask in batch.mask.values()]).any(0)
    else:
        steps = jnp.ones(first.shape[:2], bool)
    return rows[:, None] & steps


def loss_sum(
    logits: Float[jax.Array, "B *L K"], batch: Batch, *, task: TaskConfig, loss: LossName, label_smoothing: float = 0.0
) -> tuple[Float[jax.Array, ""], Float[jax.Array, ""]]:
    """Sum of the losses of all valid predictions, and their number; the quotient is the mean loss.

    Regression and multilabel losses are averaged over the K outputs of a prediction. Whatever the labels of
    predictions that do not count hold, neither the sum nor its gradient depends on it.

    Args:
        logits: outputs of the model, float [B, K] or [B, L, K].
        batch: labels and which of them count.
        task: the task.
        loss: one of `LOSSES` for the task.
        label_smoothing: for cross_entropy, probability spread evenly over all classes.

    Returns:
        Two float32 scalars.
    """
    valid = valid_predictions(task, batch)
    logits = logits.astype(jnp.float32)
    labels = jnp.asarray(batch.labels)
    labels = jnp.where(valid.reshape(valid.shape + (1,) * (labels.ndim - valid.ndim)), labels, 0)
    match loss:
        case "cross_entropy":
            target = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), label_smoothing)
            losses = optax.softmax_cross_entropy(logits, target)
        case "l1":
            losses = jnp.abs(logits - labels).mean(-1)
        case "mse":
            losses = jnp.square(logits - labels).mean(-1)
        case "bce":
            losses = optax.sigmoid_binary_cross_entropy(logits, labels).mean(-1)
        case _:
            raise ValueError(f"loss: expected one of {LOSSES}, got {loss!r}")
    return jnp.where(valid, losses, 0).sum(), valid.sum().astype(jnp.float32)


def make_loss_sum(
    task: TaskConfig, config: TrainConfig
) -> Callable[[jax.Array, Batch], tuple[Float[jax.Array, ""], Float[jax.Array, ""]]]:
    """`loss_sum` of the logits and the batch alone, with the loss that `config` asks for."""
    return functools.partial(
        loss_sum, task=task, loss=resolve_loss(task, config), label_smoothing=config.label_smoothing
    )
