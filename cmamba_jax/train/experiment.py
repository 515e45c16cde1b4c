"""One experiment from data to report."""

import dataclasses
import math
import pathlib
import platform
import sys
import time
from typing import Any

import flax
import jax
import numpy as np
import optax
from flax import nnx

import cmamba_jax
from cmamba_jax import config_json, data
from cmamba_jax.config import ExperimentConfig
from cmamba_jax.data import DataInfo, Pipeline, Splits
from cmamba_jax.errors import UserError
from cmamba_jax.models import CoupledMamba
from cmamba_jax.train import checkpoint, cluster, host_memory, loop, optimizer, parallel, runs, state
from cmamba_jax.train.evaluation import Evaluation, Evaluator
from cmamba_jax.train.objective import make_loss_sum, resolve_loss
from cmamba_jax.train.preemption import Preemption
from cmamba_jax.train.profile import Profiler
from cmamba_jax.train.report import write_report
from cmamba_jax.train.writers import MetricWriter, Progress, Silence, read_history


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What a finished experiment leaves.

    Attributes:
        run_dir: folder of the run.
        metrics: metrics of the best checkpoint for the splits "valid" and "test".
        report: the report's page.
    """

    run_dir: pathlib.Path
    metrics: dict[str, dict[str, float]]
    report: pathlib.Path


def fit(config: ExperimentConfig, splits: Splits | None = None) -> RunResult:
    """Trains a model, evaluates its best checkpoint on the test split, once, and writes a report.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from cmamba_jax import config, data, fit
        >>> rng = np.random.default_rng(0)
        >>> labels = rng.integers(0, 2, 40)
        >>> signal, noise = labels[:, None, None] + rng.normal(size=(40, 6, 2)), rng.normal(size=(40, 6, 1))
        >>> splits = data.from_arrays({"signal": signal, "noise": noise}, labels)
        >>> result = fit(
        ...     config.ExperimentConfig(
        ...         name="mine",
        ...         model=config.ModelConfig(d_model=8, d_state=4, n_layers=1),
        ...         train=config.TrainConfig(epochs=1, output=tempfile.mkdtemp()),
        ...     ),
        ...     splits,
        ... )  # doctest: +ELLIPSIS
        epoch 1/1 ...
        >>> sorted(result.metrics["test"])
        ['accuracy', 'auc', 'loss', 'macro_f1', 'weighted_f1']

    Args:
        config: everything that determines the run.
        splits: the data set, e.g. from `data.from_arrays`; None: the one that `config.data` describes.

    Returns:
        Folder, metrics and report of the run.

    Raises:
        UserError: the configuration, the folder of the run or a checkpoint is wrong, or training diverged.
        Preempted: the process received SIGTERM; the state is saved, ``train.resume`` continues.
        DataError: the data is not as expected.
    """
    started = time.perf_counter()
    config_json.check(config)
    if config.train.seeds:
        raise UserError(f"fit trains one seed, but train.seeds is {config.train.seeds}; use fit_seeds, or empty it")
    if config.train.track_test:
        raise UserError("train.track_test needs train.seeds (one is enough): set --seeds, or switch it off")
    cluster.initialize(config.parallel)
    host_memory.keep_freed_memory()
    splits = load_splits(config) if splits is None else splits
    info = splits.info
    config = resolve(config, info)
    loop.check_monitor(config.train.monitor, info.task, config.evaluation)
    strategy = parallel.make_strategy(config)
    pipeline = Pipeline(
        splits, config.pipeline, seed=config.train.seed, length_multiple=parallel.length_multiple(config)
    )
    model = CoupledMamba(config.model, features=info.features, task=info.task, rngs=nnx.Rngs(config.train.seed))
    graphdef, params = state.split_model(model)
    predict = state.make_predict_step(graphdef, strategy)
    # Traces the model, so that what it cannot do shows before there is a folder.
    jax.eval_shape(state.make_predict_step(graphdef), params, next(iter(pipeline.batches("valid"))))

    def open_run() -> str:
        folder = runs.open_run(config)
        runs.write_info(folder, info)
        runs.write_json(folder / "normalizer.json", pipeline.normalizer.to_dict())
        return str(folder)

    lead, run_dir = cluster.is_lead(), pathlib.Path(cluster.from_lead(open_run))

    schedule = optimizer.make_schedule(
        config.optimizer, steps_per_epoch=pipeline.steps_per_epoch, epochs=config.train.epochs
    )
    gradient_transformation = optimizer.make_optimizer(config.optimizer, schedule)
    loss_sum = make_loss_sum(info.task, config.train)
    evaluate = Evaluator(predict, loss_sum, info.task, config.evaluation)
    train_state = strategy.place(state.init_state(params, gradient_transformation, seed=config.train.seed))
    position = checkpoint.Position()
    batch_size = config.pipeline.batch_size
    # A grain iterator, whose state can be read and set.
    batches: Any = strategy.feed(pipeline.train(strategy.rows(batch_size)), batch_size)
    checkpoint_dir = run_dir / "checkpoints"
    if config.train.resume and checkpoint.exists(checkpoint_dir):
        train_state, position = checkpoint.load_last(checkpoint_dir, train_state, strategy)
        batches.set_state(position.data)

    n_steps = config.train.epochs * pipeline.steps_per_epoch
    writer = MetricWriter(run_dir, start_step=position.step) if lead else Silence()
    progress = Progress(n_steps, position.step, enabled=shows_bar(config)) if lead else Silence()
    profiler = Profiler(run_dir / "profile", config.train.profile_steps)
    try:
        with (
            cluster.explained(),
            Preemption() as preemption,
            checkpoint.Checkpoints(checkpoint_dir, strategy, keep=config.train.keep_checkpoints) as checkpoints,
        ):
            train_state, position = loop.train(
                train_state,
                position,
                config=config.train,
                train_step=state.make_train_step(graphdef, gradient_transformation, loss_sum, strategy),
                validate=lambda params: evaluate(strategy.portable(params), pipeline.batches("valid")).metrics,
                batches=batches,
                steps_per_epoch=pipeline.steps_per_epoch,
                batch_size=batch_size,
                learning_rate=lambda step: np.asarray(schedule((step - 1) // config.optimizer.accumulate)).item(),
                checkpoints=checkpoints,
                writer=writer,
                progress=progress,
                preempted=preemption.requested,
                profiler=profiler,
            )
    finally:
        profiler.close()
        progress.close()
        writer.close()

    best, _ = checkpoint.load_params(checkpoint_dir, strategy.portable(train_state.params))
    test = evaluate(best, pipeline.batches("test"))
    valid = evaluate(best, pipeline.batches("valid")).metrics
    model, seconds = nnx.merge(graphdef, cluster.to_host(best)), time.perf_counter() - started
    result = RunResult(run_dir, {"valid": valid, "test": test.metrics}, run_dir / "report" / "index.html")
    if lead:
        result = finish(run_dir, config, info, model, position, valid=valid, test=test, seconds=seconds)
    cluster.wait_for_all("report")
    return result


def finish(
    run_dir: pathlib.Path,
    config: ExperimentConfig,
    info: DataInfo,
    model: CoupledMamba,
    position: checkpoint.Position,
    *,
    valid: dict[str, float],
    test: Evaluation,
    seconds: float,
) -> RunResult:
    """Writes the report of a trained run.

    Args:
        run_dir: its folder.
        config: the resolved configuration.
        info: description of the data.
        model: with the parameters of the best checkpoint.
        position: where training ended.
        valid: validation metrics of the model.
        test: its score on the test split.
        seconds: how long it took.
    """
    metrics = {"valid": valid, "test": test.metrics}
    report = write_report(
        run_dir,
        config=config,
        info=info,
        metrics=metrics,
        history=read_history(run_dir),
        logits=test.logits,
        labels=test.labels,
        coupling_tables=model.coupling_tables(),
        facts=_facts(config, state.split_model(model)[1], position, seconds),
    )
    return RunResult(run_dir, metrics, report)


def load_splits(config: ExperimentConfig) -> Splits:
    """The data set that the configuration describes.

    Raises:
        UserError: it describes none.
        DataError: the data is not as expected.
    """
    if config.data is None:
        raise UserError("config.data is None: set it to a data set such as NpzConfig, or pass splits")
    return data.load(config.data)


def resolve(config: ExperimentConfig, info: DataInfo) -> ExperimentConfig:
    """Replaces what the configuration leaves open and the data decides: the rank of dt and the loss."""
    rank = config.model.dt_rank or math.ceil(config.model.d_model / 8)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, dt_rank=rank),
        train=dataclasses.replace(config.train, loss=resolve_loss(info.task, config.train)),
    )


def shows_bar(config: ExperimentConfig) -> bool:
    """Whether a progress bar suits the configuration and the terminal."""
    if config.train.progress == "auto":
        return sys.stderr.isatty() or "ipykernel" in sys.modules
    return config.train.progress == "on"


def _facts(
    config: ExperimentConfig, params: state.Params, position: checkpoint.Position, seconds: float
) -> dict[str, str]:
    versions: dict[str, Any] = {"cmamba_jax": cmamba_jax, "jax": jax, "flax": flax, "optax": optax}
    return {
        "Parameters": f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,}",
        "Epochs": f"{position.epoch}, best {position.best_epoch}",
        "Steps": f"{position.step:,}",
        "Time": f"{seconds:.0f} s",
        "Device": f"{jax.devices()[0].device_kind} ({jax.default_backend()})" + parallel.describe(config),
        "Versions": ", ".join(f"{name} {module.__version__}" for name, module in versions.items())
        + f", Python {platform.python_version()}",
    }
