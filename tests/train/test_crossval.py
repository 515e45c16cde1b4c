import dataclasses
import json
import pathlib

import numpy as np
import pytest

from cmamba_jax.config import ExperimentConfig, SyntheticConfig, TrainConfig, WatchConfig
from cmamba_jax.errors import UserError
from cmamba_jax.train import crossval
from cmamba_jax.train.experiment import RunResult
from cmamba_jax.train.seeds import SeedsResult

ACCURACY = [0.9, 0.7, 0.8]


@pytest.fixture
def config(tmp_path):
    return ExperimentConfig("watch", WatchConfig(n_folds=3), train=TrainConfig(output=str(tmp_path), epochs=2))


@pytest.fixture
def folds(monkeypatch):
    """Replaces `fit`; the list tells with which fold and folder it was called. Fold `fail` raises once."""
    calls, fail = [], {None}

    def fit(config):
        folder = pathlib.Path(config.train.run_dir)
        calls.append((config.data.fold, folder.name, config.train.resume))
        folder.mkdir(exist_ok=True)
        (folder / "config.json").touch()
        if config.data.fold in fail:
            fail.clear()
            raise KeyboardInterrupt
        return RunResult(folder, {"test": {"accuracy": ACCURACY[config.data.fold]}}, folder / "report")

    monkeypatch.setattr(crossval, "fit", fit)
    return calls, fail


def test_every_fold_once_with_mean_and_deviation(config, folds, tmp_path):
    result = crossval.cross_validate(config, message=lambda text: None)
    assert folds[0] == [(0, "fold_0", False), (1, "fold_1", False), (2, "fold_2", False)]
    assert [fold["accuracy"] for fold in result.folds] == ACCURACY
    assert result.mean["accuracy"] == pytest.approx(0.8)
    assert result.std["accuracy"] == pytest.approx(np.std(ACCURACY, ddof=1))
    assert result.path == tmp_path / "watch" / "crossval" / "crossval.json"
    written = json.loads(result.path.read_text())
    assert (written["kind"], written["name"]) == ("crossval", "watch")
    assert written["mean"] == result.mean and written["std"] == result.std and written["folds"] == result.folds


def test_finished_folds_are_not_run_again_and_an_unfinished_one_is_resumed(config, folds):
    calls, fail = folds
    fail.add(1)
    with pytest.raises(KeyboardInterrupt):
        crossval.cross_validate(config, message=lambda text: None)
    result = crossval.cross_validate(config, message=lambda text: None)
    assert calls == [(0, "fold_0", False), (1, "fold_1", False), (1, "fold_1", True), (2, "fold_2", False)]
    assert [fold["accuracy"] for fold in result.folds] == ACCURACY
    assert crossval.cross_validate(config, message=lambda text: None) == result
    assert len(calls) == 4


def test_another_configuration_needs_another_folder(config, folds, tmp_path):
    crossval.cross_validate(config, message=lambda text: None)
    other = dataclasses.replace(config, data=WatchConfig(n_folds=3, window=50))
    with pytest.raises(UserError, match="another configuration; choose another --run-dir"):
        crossval.cross_validate(other)
    elsewhere = dataclasses.replace(other, train=dataclasses.replace(other.train, run_dir=str(tmp_path / "elsewhere")))
    assert crossval.cross_validate(elsewhere, message=lambda text: None).path.parent == tmp_path / "elsewhere"


def test_data_without_folds(config):
    with pytest.raises(UserError, match="SyntheticConfig has no folds"):
        crossval.cross_validate(dataclasses.replace(config, data=SyntheticConfig()))


def test_seeds_of_a_fold_are_trained_together(config, monkeypatch):
    """A fold counts with the mean of its seeds; a seed's deviation is that of its mean over the folds."""
    values = {(fold, seed): 0.5 + 0.1 * fold + 0.01 * seed for fold in range(3) for seed in (1, 2)}

    def fit_seeds(config):
        own = [{"test": {"accuracy": values[config.data.fold, seed]}} for seed in config.train.seeds]
        folder = pathlib.Path(config.train.run_dir)
        mean = {"test": {"accuracy": float(np.mean([m["test"]["accuracy"] for m in own]))}}
        return SeedsResult(folder, [RunResult(folder, metrics, folder) for metrics in own], mean, {})

    monkeypatch.setattr(crossval, "fit_seeds", fit_seeds)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, seeds=(1, 2)))
    result = crossval.cross_validate(config, message=lambda text: None)
    assert [fold["accuracy"] for fold in result.folds] == pytest.approx([0.515, 0.615, 0.715])
    assert result.mean["accuracy"] == pytest.approx(0.615)
    assert result.seed_std["accuracy"] == pytest.approx(np.std([0.61, 0.62], ddof=1))
    assert [m["accuracy"] for m in result.seeds[1]] == pytest.approx([values[1, 1], values[1, 2]])
    assert crossval.cross_validate(config, message=lambda text: None) == result
