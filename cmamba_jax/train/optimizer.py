"""The optimizer: an optax chain from an OptimizerConfig."""

import jax
import optax

from cmamba_jax.config import OptimizerConfig

NOT_DECAYED = ("bias", "norm_scale", "A_log", "D", "gain", "mix", "weights")
"""Endings of the names of the parameters that adamw leaves alone: biases, norms, the state matrix A, the skip D, the
coupling and the weights of the fusion. What remains are the matrices and the convolutions."""


def make_schedule(config: OptimizerConfig, *, steps_per_epoch: int, epochs: int) -> optax.Schedule:
    """Learning rate as a function of the number of updates so far.

    The linear warm-up comes first; the schedule proper starts where it ends. ``step`` multiplies the rate by
    `step_factor` every `step_epochs` epochs (torch's StepLR), ``cosine`` brings it to zero at the end of the run.

    Args:
        config: the optimizer's configuration.
        steps_per_epoch: batches an epoch.
        epochs: epochs of the run; only the cosine depends on it.
    """
    updates = steps_per_epoch / config.accumulate  # updates an epoch
    warmup = round(config.warmup_epochs * updates)
    match config.schedule:
        case "constant":
            schedule = optax.constant_schedule(config.learning_rate)
        case "step":
            period = max(1, round(config.step_epochs * updates))
            schedule = optax.exponential_decay(config.learning_rate, period, config.step_factor, staircase=True)
        case "cosine":
            schedule = optax.cosine_decay_schedule(config.learning_rate, max(1, round(epochs * updates) - warmup))
    if warmup == 0:
        return schedule
    # The first update moves the parameters too: the ramp ends, rather than starts, one update outside the warm-up.
    ramp = optax.linear_schedule(config.learning_rate / (warmup + 1), config.learning_rate, warmup)
    return optax.join_schedules([ramp, schedule], [warmup])


def make_optimizer(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Clipping by the global norm, Adam or AdamW, the schedule, and gradient accumulation.

    ``adam`` adds weight_decay * parameter to the clipped gradient of every parameter, as torch.optim.Adam does
    (the paper's choice). ``adamw`` decouples the decay from the gradient's statistics and applies it to the
    parameters that `NOT_DECAYED` does not name.
    """
    clip = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    adam = optax.scale_by_adam(config.b1, config.b2)
    if config.name == "adam":
        update = [optax.add_decayed_weights(config.weight_decay), adam]
    else:
        update = [adam, optax.add_decayed_weights(config.weight_decay, mask=decay_mask)]
    chain = optax.chain(*clip, *update, optax.scale_by_learning_rate(schedule))
    if config.accumulate == 1:
        return chain
    return optax.MultiSteps(chain, config.accumulate).gradient_transformation()


def decay_mask(params: optax.Params) -> optax.Params:
    """True for the parameters that adamw decays."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not str(path[-1].key).endswith(NOT_DECAYED), params)
