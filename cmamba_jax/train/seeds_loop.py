"""The training loop of several seeds: `loop.train` for all of them, one compiled step at a time."""

import dataclasses
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cmamba_jax.batch import Batch
from cmamba_jax.config import TrainConfig
from cmamba_jax.train import checkpoint, loop, state
from cmamba_jax.train.checkpoint import Position
from cmamba_jax.train.compilation import jit
from cmamba_jax.train.preemption import Preempted
from cmamba_jax.train.state import Params, StepMetrics, TrainState
from cmamba_jax.train.writers import Progress

Metrics = dict[str, float]
How = Literal["vmap", "loop"]


def over_seeds(function: Callable, how: How | None = None) -> Callable:
    """Maps a function of trees over their leading axis S, in one program.

    Args:
        function: what is done for one seed.
        how: "vmap": all at once, operation by operation; "loop": one seed after the other inside the program, which
            keeps a seed's intermediate results in a CPU's cache. None: "loop" on CPUs, "vmap" on all else.
    """
    if (how or ("loop" if jax.default_backend() == "cpu" else "vmap")) == "vmap":
        return jax.vmap(function)
    return lambda *trees: jax.lax.map(lambda parts: function(*parts), trees)


def make_seeds_step(
    step: state.TrainStep, how: How | None = None
) -> Callable[[TrainState, Batch, jax.Array | None], tuple[TrainState, StepMetrics]]:
    """Compiles ``step(state, batch, active) -> (state, metrics)`` for S seeds; the state passed in is donated.

    All arrays have a leading axis S. Where `active`, bool [S], is False a seed has stopped and stays as it is; None:
    all are active.

    Args:
        step: the step of one seed, from `state.train_step`.
        how: see `over_seeds`.
    """
    every = over_seeds(step, how)

    def all_seeds(old: TrainState, batch: Batch, active: jax.Array | None) -> tuple[TrainState, StepMetrics]:
        new, metrics = every(old, batch)
        return (new if active is None else _select(active, new, old)), metrics

    return jit(all_seeds, donate_argnums=0)


def make_seeds_predict(graphdef: nnx.GraphDef, how: How | None = None) -> Callable[[Params, Batch], jax.Array]:
    """Compiles ``predict(params, batch) -> logits`` for S seeds, which share the batch."""
    predict = state.predict_step(graphdef)
    return jit(lambda params, batch: over_seeds(lambda own: predict(own, batch), how)(params))


@dataclasses.dataclass
class Member:
    """One seed of the group: its folder, where it stands, its batches and its records."""

    folder: pathlib.Path
    position: Position
    batches: Any
    writer: Any = None


def train(
    group: TrainState,
    best: Params,
    members: list[Member],
    *,
    config: TrainConfig,
    step: Callable[[TrainState, Batch, jax.Array | None], tuple[TrainState, StepMetrics]],
    score: Callable[[Params, Literal["valid", "test"]], list[Metrics]],
    steps_per_epoch: int,
    batch_size: int,
    learning_rate: Callable[[int], float],
    checkpoints: checkpoint.Checkpoints,
    progress: Progress,
    preempted: Callable[[int], bool] = lambda step: False,
) -> tuple[TrainState, Params]:
    """`loop.train` for all members; each stops when a run of its own would.

    Args:
        group: training state with a leading axis S; donated.
        best: parameters of the best epoch of each seed, likewise.
        members: the seeds, whose positions move.
        config: the training configuration.
        step: from `make_seeds_step`.
        score: metrics of each seed's parameters on a split.
        steps_per_epoch: steps an epoch.
        batch_size: samples a step of one seed.
        learning_rate: rate of a step (counted from 1), for the records.
        checkpoints: where to save.
        progress: what the user sees.
        preempted: whether to save and stop after a step, see `preemption`.

    Returns:
        The final state, and the best parameters.

    Raises:
        Preempted: `preempted` said so; the state is saved.
        NonFiniteError: a loss, gradient or validation loss of a seed is not finite.
    """

    def save(step: int, epoch: int) -> None:
        where = Position(step, epoch, data=[dataclasses.asdict(member.position) for member in members])
        checkpoints.save("last", packed(group, best), where)

    silent = Progress(0, enabled=False)
    pick = jax.jit(_select)

    def going(member: Member) -> bool:
        return member.position.epoch < config.epochs and not loop.stopped(member.position, config)

    while any(active := [going(member) for member in members]):
        started = time.perf_counter()
        start = max(member.position.step for member in members)
        epoch = max(member.position.epoch for member in members) + 1
        end = epoch * steps_per_epoch
        shows = active.index(True)
        logs = [
            loop.EpochLog(
                epoch,
                config.log_every,
                batch_size,
                learning_rate,
                m.writer,
                progress if i == shows else silent,
                m.position.losses,
            )
            for i, m in enumerate(members)
        ]
        # Without early stopping all seeds end together. The choice holds for the run: another one would compile again.
        mask = None if config.patience is None else jnp.asarray(active)
        pending: tuple[int, StepMetrics] | None = None
        for number in range(start + 1, end + 1):
            group, metrics = step(group, stacked([next(m.batches) for m in members]), mask)
            _read(pending, logs, active, members, group)
            pending = (number, metrics)
            if number < end and preempted(number):
                _read(pending, logs, active, members, group, drain=True)
                for member, log, on in zip(members, logs, active, strict=True):
                    # The batches of a seed that has stopped go on too, unread, until all have.
                    own = {"step": number, "losses": log.unwritten} if on else {}
                    member.position = dataclasses.replace(member.position, data=member.batches.get_state(), **own)
                save(number, epoch - 1)
                raise Preempted(f"saved at step {number}")
        _read(pending, logs, active, members, group, last=True)

        improved = [False] * len(members)
        test = score(group.params, "test") if config.track_test else []
        for i, values in enumerate(score(group.params, "valid")):
            member, old = members[i], members[i].position
            if not active[i]:
                continue
            if not math.isfinite(values["loss"]):
                raise loop.NonFiniteError(
                    f"{member.folder.name}: the validation loss is {values['loss']} after epoch {epoch}; {loop.CURE}"
                )
            value = values[config.monitor]
            improved[i] = old.best_epoch == 0 or loop.better(value, old.best_value, config.monitor)
            member.position = Position(
                step=end,
                epoch=epoch,
                best_epoch=epoch if improved[i] else old.best_epoch,
                best_value=value if improved[i] else old.best_value,
                data=member.batches.get_state(),
            )
            member.writer.write(end, epoch, "valid", values)
            if test:
                member.writer.write(end, epoch, "test", test[i])
        best = pick(jnp.asarray(improved), group.params, best)
        losses = np.mean([log.mean_loss for log, on in zip(logs, active, strict=True) if on])
        tops = "  ".join(f"{m.position.best_value:.4f}" for m in members)
        progress.message(
            f"epoch {epoch}/{config.epochs}  train loss {losses:.4f}  best valid {config.monitor} of each seed {tops}  "
            f"{time.perf_counter() - started:.1f} s"
        )
        told = preempted(end)
        if told or epoch % config.checkpoint_every == 0 or not any(map(going, members)):
            save(end, epoch)
        if told:
            raise Preempted(f"saved at step {end}")
    return group, best


def _read(
    pending: tuple[int, StepMetrics] | None,
    logs: list[loop.EpochLog],
    active: list[bool],
    members: list[Member],
    group: TrainState,
    *,
    drain: bool = False,
    last: bool = False,
) -> None:
    """Hands each seed its part of the metrics of a step, which its log reads one step late.

    With `drain` at once, and at the `last` step of an epoch too.
    """
    if pending is None:
        return
    number, metrics = pending[0], jax.device_get(pending[1])
    for i, log in enumerate(logs):
        if active[i]:
            try:
                log.add(number, jax.tree.map(lambda x, i=i: x[i], metrics), group)
                if drain or last:
                    log.read(group, last=last)
            except loop.NonFiniteError as error:
                raise loop.NonFiniteError(f"{members[i].folder.name}: {error}") from None


def stacked(batches: list[Batch]) -> Batch:
    """Batches of all seeds, with a leading axis S; buckets may give them different lengths: the longest decides."""

    def stack(*leaves: np.ndarray) -> np.ndarray:
        shape = np.max([leaf.shape for leaf in leaves], axis=0)
        if any(leaf.shape != tuple(shape) for leaf in leaves):
            leaves = tuple(np.pad(x, [(0, n - k) for n, k in zip(shape, x.shape, strict=True)]) for x in leaves)
        return np.stack(leaves)

    return jax.tree.map(stack, *batches)


def _select(choose: jax.Array, new: Any, old: Any) -> Any:
    """Leaf by leaf, and seed by seed, the new value or the old one."""
    return jax.tree.map(lambda n, o: jnp.where(choose.reshape(-1, *(1 for _ in n.shape[1:])), n, o), new, old)


def packed(group: TrainState, best: Params) -> TrainState:
    """The state of the group as one training state: its parameters are the newest and the best of all seeds."""
    return dataclasses.replace(group, params={"last": group.params, "best": best})
