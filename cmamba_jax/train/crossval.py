"""Cross-validation over the folds of a data set."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from cmamba_jax.config import ExperimentConfig, WatchConfig
from cmamba_jax.config_json import check, to_dict
from cmamba_jax.errors import UserError
from cmamba_jax.train import runs
from cmamba_jax.train.experiment import fit


@dataclasses.dataclass(frozen=True)
class CrossValidation:
    """The scores of all folds.

    Attributes:
        path: the file crossval.json that holds them.
        folds: test metrics of each fold.
        mean: mean of each metric over the folds.
        std: standard deviation over the folds (n - 1 in the denominator).
    """

    path: pathlib.Path
    folds: list[dict[str, float]]
    mean: dict[str, float]
    std: dict[str, float]


def cross_validate(config: ExperimentConfig, *, message: Callable[[str], None] = print) -> CrossValidation:
    """Trains and tests one model a fold.

    The folder is `train.run_dir`, or OUTPUT/NAME/crossval; fold i goes to its subfolder ``fold_i``. Called again, it
    takes finished folds from crossval.json and continues an unfinished one from its last checkpoint.

    Args:
        config: configuration of data with folds; its ``fold`` is not read.
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
    if done["config"] != settings:
        raise UserError(f"{folder} holds a cross-validation of another configuration; choose another --run-dir")

    folder.mkdir(parents=True, exist_ok=True)
    runs.write_json(path, done)
    folds = done["folds"]
    for fold in range(len(folds), n_folds):
        message(f"fold {fold + 1}/{n_folds}")
        run_dir = folder / f"fold_{fold}"
        train = dataclasses.replace(config.train, run_dir=str(run_dir), resume=(run_dir / "config.json").exists())
        result = fit(dataclasses.replace(config, data=dataclasses.replace(data, fold=fold), train=train))
        folds.append(result.metrics["test"])
        runs.write_json(path, done)
    mean, std = _statistics(folds)
    runs.write_json(path, done | {"mean": mean, "std": std})
    return CrossValidation(path, folds, mean, std)


def _settings(config: ExperimentConfig) -> dict[str, Any]:
    """What has to be the same when a cross-validation is continued."""
    values = to_dict(config)
    del values["data"]["fold"]
    for name in ("output", "run_dir", "resume", "progress"):
        del values["train"][name]
    return values


def _statistics(folds: list[dict[str, float]]) -> tuple[dict[str, float], dict[str, float]]:
    columns = {name: [fold[name] for fold in folds] for name in folds[0]}
    mean = {name: float(np.mean(values)) for name, values in columns.items()}
    std = {name: float(np.std(values, ddof=1)) for name, values in columns.items()}
    return mean, std
