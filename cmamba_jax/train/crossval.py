"""Cross-validation over the folds of a data set."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

from cmamba_jax.config import ExperimentConfig, WatchConfig
from cmamba_jax.config_json import check, to_dict
from cmamba_jax.errors import UserError
from cmamba_jax.results.records import describe
from cmamba_jax.train import runs
from cmamba_jax.train.experiment import fit
from cmamba_jax.train.seeds import fit_seeds, statistics


@dataclasses.dataclass(frozen=True)
class CrossValidation:
    """The scores of all folds.

    Attributes:
        path: the file crossval.json that holds them.
        folds: test metrics of each fold.
        mean: mean of each metric over the folds.
        std: standard deviation over the folds (n - 1 in the denominator).
        seeds: with `train.seeds`, test metrics of each seed in each fold, whose means over the seeds are `folds`.
        seed_std: with `train.seeds`, standard deviation over the seeds of each seed's mean over the folds.
    """

    path: pathlib.Path
    folds: list[dict[str, float]]
    mean: dict[str, float]
    std: dict[str, float]
    seeds: list[list[dict[str, float]]] = dataclasses.field(default_factory=list)
    seed_std: dict[str, float] = dataclasses.field(default_factory=dict)


def cross_validate(
    config: ExperimentConfig, *, command: str = "", message: Callable[[str], None] = print
) -> CrossValidation:
    """Trains and tests one model a fold, or one for each of `train.seeds`, those of a fold together.

    The folder is `train.run_dir`, or OUTPUT/NAME/crossval; fold i goes to its subfolder ``fold_i``. Called again, it
    takes finished folds from crossval.json and continues an unfinished one from its last checkpoint.

    Args:
        config: configuration of data with folds; its ``fold`` is not read.
        command: what the command line says after ``cmamba``, for the record.
        message: receives a line before each fold.

    Raises:
        UserError: the data has no folds, or the folder holds another cross-validation.
    """
    check(config)
    data = config.data
    if not isinstance(data, WatchConfig):
        raise UserError(f"{type(data).__name__} has no folds; cross-validation needs data with folds (WatchConfig)")
    n_folds = data.n_folds
    default = pathlib.Path(config.train.output) / config.name / "crossval"
    folder = pathlib.Path(config.train.run_dir or default).expanduser()
    path = folder / "crossval.json"
    settings = _settings(config)
    done = runs.read_json(path) if path.exists() else {"config": settings, "folds": []}
    done |= describe("crossval", command) | {"name": config.name, "monitor": config.train.monitor}
    if done["config"] != settings:
        raise UserError(f"{folder} holds a cross-validation of another configuration; choose another --run-dir")

    folder.mkdir(parents=True, exist_ok=True)
    runs.write_json(path, done)
    folds = done["folds"]
    for fold in range(len(folds), n_folds):
        message(f"fold {fold + 1}/{n_folds}")
        run_dir = folder / f"fold_{fold}"
        train = dataclasses.replace(config.train, run_dir=str(run_dir), resume=(run_dir / "config.json").exists())
        part = dataclasses.replace(config, data=dataclasses.replace(data, fold=fold), train=train)
        if train.seeds:
            group = fit_seeds(part)
            done.setdefault("seeds", []).append([run.metrics["test"] for run in group.runs])
            folds.append(group.mean["test"])
        else:
            folds.append(fit(part).metrics["test"])
        runs.write_json(path, done)
    mean, std = statistics(folds)
    seeds = done.get("seeds", [])
    seed_std = statistics([statistics(own)[0] for own in zip(*seeds, strict=True)])[1] if seeds else {}
    runs.write_json(path, done | {"mean": mean, "std": std} | ({"seed_std": seed_std} if seeds else {}))
    return CrossValidation(path, folds, mean, std, seeds, seed_std)


def _settings(config: ExperimentConfig) -> dict[str, Any]:
    """What has to be the same when a cross-validation is continued."""
    values = to_dict(config)
    del values["data"]["fold"], values["paper"]
    for name in ("output", "run_dir", "resume", "progress"):
        del values["train"][name]
    return values
