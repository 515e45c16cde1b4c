import dataclasses

import pytest

from cmamba_jax.config import ExperimentConfig, SyntheticConfig, TaskConfig, TrainConfig
from cmamba_jax.data import DataInfo
from cmamba_jax.errors import UserError
from cmamba_jax.train import runs


@pytest.fixture
def config(tmp_path):
    def make(name="demo", **train):
        return ExperimentConfig(
            name, SyntheticConfig(length=48), train=TrainConfig(**{"output": str(tmp_path), **train})
        )

    return make


def test_new_runs_are_numbered(config, tmp_path):
    assert [runs.open_run(config()) for _ in range(2)] == [tmp_path / "demo/001", tmp_path / "demo/002"]
    assert runs.open_run(config("other")) == tmp_path / "other/001"
    assert runs.read_config(tmp_path / "demo/001") == config()


def test_resume_finds_the_newest_run_or_the_given_one(config, tmp_path):
    first, second = runs.open_run(config()), runs.open_run(config())
    assert runs.open_run(config(resume=True)) == second
    assert runs.open_run(config(resume=True, run_dir=str(first))) == first


def test_a_resumed_run_may_be_longer_but_not_different(config):
    runs.open_run(config(epochs=3))
    longer = config(epochs=9, resume=True)
    assert runs.read_config(runs.open_run(longer)) == longer
    other = dataclasses.replace(
        longer, data=SyntheticConfig(length=9), model=dataclasses.replace(longer.model, d_state=8)
    )
    with pytest.raises(UserError, match=r"data.length \(48 -> 9\), model.d_state \(64 -> 8\)"):
        runs.open_run(other)


def test_a_run_is_not_overwritten(config, tmp_path):
    runs.open_run(config(run_dir=str(tmp_path / "mine")))
    with pytest.raises(UserError, match=r"holds a run already; add --resume"):
        runs.open_run(config(run_dir=str(tmp_path / "mine")))


def test_nothing_to_resume(config, tmp_path):
    with pytest.raises(UserError, match="no run to resume"):
        runs.open_run(config(resume=True))
    with pytest.raises(UserError, match="no run to resume"):
        runs.open_run(config(resume=True, run_dir=str(tmp_path)))


def test_info_keeps_the_order_of_the_modalities(tmp_path):
    info = DataInfo({"z": 2, "a": 3}, TaskConfig(kind="classification", n_outputs=2), ("no", "yes"))
    runs.write_info(tmp_path, info)
    read = runs.read_info(tmp_path)
    assert read == info and list(read.features) == ["z", "a"]


def test_files_that_are_absent_or_damaged(tmp_path):
    with pytest.raises(UserError, match=r"does not exist; expected the folder of a run"):
        runs.read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json cannot be read"):
        runs.read_config(tmp_path)
