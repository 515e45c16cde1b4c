"""Several seeds of one experiment, trained together: one compiled step for all of them.

Parameters, optimizer states, random keys and batches get a leading axis S, and the training step of a single run is
mapped over it. Each seed has its own data order, augmentation and dropout, its own best epoch and early stopping, and
ends as an ordinary run in its own folder, equal to one trained alone to float rounding: the compiler may order the
sums of a mapped program in its own way, and Adam, which divides by the size of the gradient, makes such differences
grow over many steps.
"""

import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cmamba_jax import config_json
from cmamba_jax.batch import Batch
from cmamba_jax.config import ExperimentConfig, ParallelConfig, TrainConfig
from cmamba_jax.data import Pipeline, Splits
from cmamba_jax.errors import UserError
from cmamba_jax.metrics import METRICS
from cmamba_jax.models import CoupledMamba
from cmamba_jax.train import checkpoint, cluster, loop, optimizer, runs, state
from cmamba_jax.train.checkpoint import Position
from cmamba_jax.train.evaluation import Evaluator
from cmamba_jax.train.experiment import RunResult, finish, load_splits, resolve, shows_bar
from cmamba_jax.train.objective import make_loss_sum
from cmamba_jax.train.state import Params, StepMetrics, TrainState
from cmamba_jax.train.writers import MetricWriter, Progress, read_history

Metrics = dict[str, float]
How = Literal["vmap", "loop"]


@dataclasses.dataclass(frozen=True)
class SeedsResult:
    """The scores of all seeds.

    Attributes:
        run_dir: folder of the group; seed s is the run in its subfolder ``seed_s``.
        runs: result of each seed, in the order of `train.seeds`.
        mean: mean over the seeds of each metric, for the splits "valid" and "test".
        std: standard deviation over the seeds (n - 1 in the denominator; 0 for one seed).
        test_chosen: with `train.track_test`, for each metric its value in every seed at the epoch where it is best on
            the test split: optimistic numbers, which choose on the test set.
    """

    run_dir: pathlib.Path
    runs: list[RunResult]
    mean: dict[str, Metrics]
    std: dict[str, Metrics]
    test_chosen: dict[str, list[float]] = dataclasses.field(default_factory=dict)


def statistics(rows: Sequence[Metrics]) -> tuple[Metrics, Metrics]:
    """Mean and standard deviation (n - 1 in the denominator; 0 for one row) of each metric."""
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    std = {name: float(np.std(values, ddof=1)) if len(values) > 1 else 0.0 for name, values in columns.items()}
    return {name: float(np.mean(values)) for name, values in columns.items()}, std


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

    return jax.jit(all_seeds, donate_argnums=0)


def make_seeds_predict(graphdef: nnx.GraphDef, how: How | None = None) -> Callable[[Params, Batch], jax.Array]:
    """Compiles ``predict(params, batch) -> logits`` for S seeds, which share the batch."""
    predict = state.predict_step(graphdef)
    return jax.jit(lambda params, batch: over_seeds(lambda own: predict(own, batch), how)(params))


def fit_seeds(config: ExperimentConfig, splits: Splits | None = None) -> SeedsResult:
    """Trains the model once for each of `train.seeds`, all together, and tests the best checkpoint of each, once.

    Example:
        >>> import tempfile
        >>> from cmamba_jax import ExperimentConfig, ModelConfig, SyntheticConfig, TrainConfig
        >>> from cmamba_jax.train import fit_seeds
        >>> result = fit_seeds(
        ...     ExperimentConfig(
        ...         name="recall",
        ...         data=SyntheticConfig(n_train=16, n_valid=8, n_test=8, n_classes=2),
        ...         model=ModelConfig(d_model=4, d_state=2, n_layers=1),
        ...         train=TrainConfig(epochs=1, seeds=(1, 2), output=tempfile.mkdtemp()),
        ...     )
        ... )  # doctest: +ELLIPSIS
        epoch 1/1 ...
        >>> [run.run_dir.name for run in result.runs], sorted(result.mean)
        (['seed_1', 'seed_2'], ['test', 'valid'])

    Args:
        config: everything that determines the runs; `train.seed` is not read.
        splits: the data set; None: the one that `config.data` describes.

    Returns:
        The results, also written to seeds.json in the folder of the group.

    Raises:
        UserError: there are no seeds or one comes twice, or what `fit` raises.
        DataError: the data is not as expected.
    """
    started = time.perf_counter()
    config_json.check(config)
    seeds = config.train.seeds
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"train.seeds: expected different numbers, at least one, got {list(seeds)}")
    if config.parallel != ParallelConfig():
        raise UserError("train.seeds trains all seeds on one device: leave out --parallel.*, or train one seed a run")
    if name := cluster.detected():
        raise UserError(f"train.seeds trains in one process, but {name} started several; start one, or one seed a run")
    if config.train.profile_steps:
        raise UserError("train.profile_steps profiles a single run: leave out train.seeds")
    splits = load_splits(config) if splits is None else splits
    info = splits.info
    config = resolve(config, info)
    loop.check_monitor(config.train.monitor, info.task, config.evaluation)
    pipeline = Pipeline(splits, config.pipeline, seed=seeds[0])
    models = [CoupledMamba(config.model, features=info.features, task=info.task, rngs=nnx.Rngs(s)) for s in seeds]
    graphdef = state.split_model(models[0])[0]
    predict = make_seeds_predict(graphdef)

    schedule = optimizer.make_schedule(
        config.optimizer, steps_per_epoch=pipeline.steps_per_epoch, epochs=config.train.epochs
    )
    transformation = optimizer.make_optimizer(config.optimizer, schedule)
    loss_sum = make_loss_sum(info.task, config.train)
    evaluate = Evaluator(predict, loss_sum, info.task, config.evaluation)
    singles = [
        state.init_state(state.split_model(model)[1], transformation, seed=seed)
        for model, seed in zip(models, seeds, strict=True)
    ]
    group = jax.tree.map(lambda *leaves: jnp.stack(leaves), *singles)
    best: Params = jax.tree.map(jnp.copy, group.params)
    # Traces the model, so that what it cannot do shows before there is a folder.
    jax.eval_shape(predict, group.params, next(iter(pipeline.batches("valid"))))

    folder = runs.open_run(config)
    iterators: list[Any] = [pipeline.with_seed(seed).train() for seed in seeds]
    positions = [Position() for _ in seeds]
    if config.train.resume and checkpoint.exists(folder / "checkpoints"):
        saved, position = checkpoint.load_last(folder / "checkpoints", _packed(group, best))
        group, best = dataclasses.replace(saved, params=saved.params["last"]), saved.params["best"]
        positions = [Position(**values) for values in position.data]
        for iterator, own in zip(iterators, positions, strict=True):
            iterator.set_state(own.data)

    configs = [_seed_config(config, folder, seed) for seed in seeds]
    members = [_Member(runs.open_run(own), *pair) for own, *pair in zip(configs, positions, iterators, strict=True)]
    for member in members:
        runs.write_info(member.folder, info)
        runs.write_json(member.folder / "normalizer.json", pipeline.normalizer.to_dict())
        member.writer = MetricWriter(member.folder, start_step=member.position.step)
    total = config.train.epochs * pipeline.steps_per_epoch
    progress = Progress(total, max(member.position.step for member in members), enabled=shows_bar(config))
    try:
        with checkpoint.Checkpoints(folder / "checkpoints", keep=config.train.keep_checkpoints) as checkpoints:
            group, best = _train(
                group,
                best,
                members,
                config=config.train,
                step=make_seeds_step(state.train_step(graphdef, transformation, loss_sum)),
                score=lambda params, split: [
                    e.metrics for e in evaluate.each(params, pipeline.batches(split), len(seeds))
                ],
                steps_per_epoch=pipeline.steps_per_epoch,
                batch_size=config.pipeline.batch_size,
                learning_rate=lambda step: np.asarray(schedule((step - 1) // config.optimizer.accumulate)).item(),
                checkpoints=checkpoints,
                progress=progress,
            )
    finally:
        progress.close()
        for member in members:
            member.writer.close()

    valid, test = (evaluate.each(best, pipeline.batches(split), len(seeds)) for split in ("valid", "test"))
    results = []
    for i, (member, own) in enumerate(zip(members, configs, strict=True)):
        last, best_params = (jax.tree.map(lambda x, i=i: x[i], part) for part in (group, best))
        _save_single(member, last, best_params)
        results.append(
            finish(
                member.folder,
                own,
                info,
                nnx.merge(graphdef, best_params),
                member.position,
                valid=valid[i].metrics,
                test=test[i],
                seconds=time.perf_counter() - started,
            )
        )
    return _summary(folder, config.train, results)


@dataclasses.dataclass
class _Member:
    """One seed of the group: its folder, where it stands, its batches and its records."""

    folder: pathlib.Path
    position: Position
    batches: Any
    writer: Any = None


def _train(
    group: TrainState,
    best: Params,
    members: list[_Member],
    *,
    config: TrainConfig,
    step: Callable[[TrainState, Batch, jax.Array | None], tuple[TrainState, StepMetrics]],
    score: Callable[[Params, Literal["valid", "test"]], list[Metrics]],
    steps_per_epoch: int,
    batch_size: int,
    learning_rate: Callable[[int], float],
    checkpoints: checkpoint.Checkpoints,
    progress: Progress,
) -> tuple[TrainState, Params]:
    """`loop.train` for all members; each stops when a run of its own would."""
    silent = Progress(0, enabled=False)
    pick = jax.jit(_select)

    def going(member: _Member) -> bool:
        return member.position.epoch < config.epochs and not loop.stopped(member.position, config)

    while any(active := [going(member) for member in members]):
        started = time.perf_counter()
        start = max(member.position.step for member in members)
        epoch = max(member.position.epoch for member in members) + 1
        shows = active.index(True)
        logs = [
            loop.EpochLog(
                epoch, config.log_every, batch_size, learning_rate, m.writer, progress if i == shows else silent
            )
            for i, m in enumerate(members)
        ]
        # Without early stopping all seeds end together. The choice holds for the run: another one would compile again.
        mask = None if config.patience is None else jnp.asarray(active)
        pending: tuple[int, StepMetrics] | None = None
        for number in range(start + 1, start + steps_per_epoch + 1):
            group, metrics = step(group, _stacked([next(m.batches) for m in members]), mask)
            _read(pending, logs, active, members, group)
            pending = (number, metrics)
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
                step=start + steps_per_epoch,
                epoch=epoch,
                best_epoch=epoch if improved[i] else old.best_epoch,
                best_value=value if improved[i] else old.best_value,
                data=member.batches.get_state(),
            )
            member.writer.write(start + steps_per_epoch, epoch, "valid", values)
            if test:
                member.writer.write(start + steps_per_epoch, epoch, "test", test[i])
        best = pick(jnp.asarray(improved), group.params, best)
        losses = np.mean([log.mean_loss for log, on in zip(logs, active, strict=True) if on])
        tops = "  ".join(f"{m.position.best_value:.4f}" for m in members)
        progress.message(
            f"epoch {epoch}/{config.epochs}  train loss {losses:.4f}  best valid {config.monitor} of each seed {tops}  "
            f"{time.perf_counter() - started:.1f} s"
        )
        if epoch % config.checkpoint_every == 0 or not any(map(going, members)):
            where = Position(start + steps_per_epoch, epoch, data=[dataclasses.asdict(m.position) for m in members])
            checkpoints.save("last", _packed(group, best), where)
    return group, best


def _read(
    pending: tuple[int, StepMetrics] | None,
    logs: list[loop.EpochLog],
    active: list[bool],
    members: list[_Member],
    group: TrainState,
    *,
    last: bool = False,
) -> None:
    """Hands each seed its part of the metrics of a step, one step late."""
    if pending is None:
        return
    number, metrics = pending[0], jax.device_get(pending[1])
    for i, log in enumerate(logs):
        if active[i]:
            try:
                log.add(number, jax.tree.map(lambda x, i=i: x[i], metrics), group)
                if last:
                    log.read(group, last=True)
            except loop.NonFiniteError as error:
                raise loop.NonFiniteError(f"{members[i].folder.name}: {error}") from None


def _stacked(batches: list[Batch]) -> Batch:
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


def _packed(group: TrainState, best: Params) -> TrainState:
    """The state of the group as one training state: its parameters are the newest and the best of all seeds."""
    return dataclasses.replace(group, params={"last": group.params, "best": best})


def _seed_config(config: ExperimentConfig, folder: pathlib.Path, seed: int) -> ExperimentConfig:
    """The configuration of one seed as a run of its own."""
    own = folder / f"seed_{seed}"
    resume = (own / "config.json").exists()
    return dataclasses.replace(
        config, train=dataclasses.replace(config.train, seed=seed, seeds=(), run_dir=str(own), resume=resume)
    )


def _save_single(member: _Member, last: TrainState, best: Params) -> None:
    """Writes the checkpoints that a run of its own would have left."""
    position = member.position
    with checkpoint.Checkpoints(member.folder / "checkpoints") as checkpoints:
        step = position.step // position.epoch * position.best_epoch
        at_best = dataclasses.replace(position, step=step, epoch=position.best_epoch, data=None)
        checkpoints.save("best", dataclasses.replace(last, params=best), at_best)
        checkpoints.save("last", last, position)


def _summary(folder: pathlib.Path, config: TrainConfig, results: list[RunResult]) -> SeedsResult:
    splits = {split: statistics([r.metrics[split] for r in results]) for split in ("valid", "test")}
    mean, std = ({split: pair[k] for split, pair in splits.items()} for k in (0, 1))
    values: dict[str, Any] = {
        "seeds": list(config.seeds),
        "runs": [r.metrics for r in results],
        "mean": mean,
        "std": std,
    }
    chosen: dict[str, list[float]] = {}
    if config.track_test:
        tested = [[r for r in read_history(result.run_dir) if r["split"] == "test"] for result in results]
        for name in mean["test"]:
            extreme = min if METRICS[name] == "min" else max
            chosen[name] = [extreme(record[name] for record in records) for records in tested]
        values["test_chosen"] = chosen
    runs.write_json(folder / "seeds.json", values)
    return SeedsResult(folder, results, mean, std, chosen)
