"""Several seeds of one experiment, trained together: one compiled step for all of them.

Parameters, optimizer states, random keys and batches get a leading axis S, and the training step of a single run is
mapped over it. Each seed has its own data order, augmentation and dropout, its own best epoch and early stopping, and
ends as an ordinary run in its own folder, equal to one trained alone to float rounding: the compiler may order the
sums of a mapped program in its own way, and Adam, which divides by the size of the gradient, makes such differences
grow over many steps.
"""

import dataclasses
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cmamba_jax import config_json
from cmamba_jax.config import ExperimentConfig, ParallelConfig, TrainConfig
from cmamba_jax.data import Pipeline, Splits
from cmamba_jax.errors import UserError
from cmamba_jax.metrics import METRICS
from cmamba_jax.models import CoupledMamba
from cmamba_jax.train import checkpoint, cluster, host_memory, loop, optimizer, runs, state
from cmamba_jax.train.checkpoint import Position
from cmamba_jax.train.evaluation import Evaluator
from cmamba_jax.train.experiment import RunResult, finish, load_splits, resolve, shows_bar
from cmamba_jax.train.objective import make_loss_sum
from cmamba_jax.train.preemption import Preemption
from cmamba_jax.train.seeds_loop import Member, Metrics, make_seeds_predict, make_seeds_step, packed, train
from cmamba_jax.train.state import Params, TrainState
from cmamba_jax.train.writers import MetricWriter, Progress, read_history


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
        Preempted: the process received SIGTERM; the state of all seeds is saved, ``train.resume`` continues.
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
    host_memory.keep_freed_memory()
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
        saved, position = checkpoint.load_last(folder / "checkpoints", packed(group, best))
        group, best = dataclasses.replace(saved, params=saved.params["last"]), saved.params["best"]
        positions = [Position(**values) for values in position.data]
        for iterator, own in zip(iterators, positions, strict=True):
            iterator.set_state(own.data)

    configs = [_seed_config(config, folder, seed) for seed in seeds]
    members = [Member(runs.open_run(own), *pair) for own, *pair in zip(configs, positions, iterators, strict=True)]
    for member in members:
        runs.write_info(member.folder, info)
        runs.write_json(member.folder / "normalizer.json", pipeline.normalizer.to_dict())
        member.writer = MetricWriter(member.folder, start_step=member.position.step)
    total = config.train.epochs * pipeline.steps_per_epoch
    progress = Progress(total, max(member.position.step for member in members), enabled=shows_bar(config))
    try:
        with (
            Preemption() as preemption,
            checkpoint.Checkpoints(folder / "checkpoints", keep=config.train.keep_checkpoints) as checkpoints,
        ):
            group, best = train(
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
                preempted=preemption.requested,
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


def _seed_config(config: ExperimentConfig, folder: pathlib.Path, seed: int) -> ExperimentConfig:
    """The configuration of one seed as a run of its own."""
    own = folder / f"seed_{seed}"
    resume = (own / "config.json").exists()
    return dataclasses.replace(
        config, train=dataclasses.replace(config.train, seed=seed, seeds=(), run_dir=str(own), resume=resume)
    )


def _save_single(member: Member, last: TrainState, best: Params) -> None:
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
