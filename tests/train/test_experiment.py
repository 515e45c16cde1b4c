import dataclasses
import json

import numpy as np
import pytest

from cmamba_jax.config import ExperimentConfig, ModelConfig, PipelineConfig, SyntheticConfig, TrainConfig
from cmamba_jax.data import from_arrays
from cmamba_jax.errors import UserError
from cmamba_jax.train import fit, load_run
from cmamba_jax.train.experiment import resolve
from cmamba_jax.train.writers import read_history


def test_a_run_folder_is_complete(tiny_run, tiny_experiment):
    files = {str(p.relative_to(tiny_run.run_dir)) for p in tiny_run.run_dir.rglob("*") if p.is_file()}
    assert {"config.json", "info.json", "normalizer.json", "metrics.jsonl", "report/index.html"} <= files
    assert tiny_run.report == tiny_run.run_dir / "report" / "index.html"
    assert {p.name for p in (tiny_run.run_dir / "checkpoints").iterdir()} == {"best", "last"}
    history = read_history(tiny_run.run_dir)
    assert {r["split"] for r in history} == {"train", "valid"}
    assert max(r["epoch"] for r in history) == tiny_experiment.train.epochs


def test_results_are_those_of_the_best_checkpoint(tiny_run):
    history = [r for r in read_history(tiny_run.run_dir) if r["split"] == "valid"]
    best = min(history, key=lambda r: r["loss"])
    for name, value in tiny_run.metrics["valid"].items():
        assert value == pytest.approx(best[name], rel=1e-6)
    written = json.loads((tiny_run.run_dir / "report" / "metrics.json").read_text())
    assert written["test"] == pytest.approx(tiny_run.metrics["test"])


def test_a_finished_run_resumes_to_the_same_result(tiny_run, tiny_experiment):
    before = (tiny_run.run_dir / "metrics.jsonl").read_bytes()
    train = dataclasses.replace(tiny_experiment.train, run_dir=str(tiny_run.run_dir), resume=True)
    again = fit(dataclasses.replace(tiny_experiment, train=train))
    assert again == tiny_run
    assert (tiny_run.run_dir / "metrics.jsonl").read_bytes() == before


def test_arrays_in_memory_with_labels_per_step(tmp_path):
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 7, 30)
    inputs = {"a": [rng.normal(size=(n, 2)) for n in lengths], "b": [rng.normal(size=(n, 1)) for n in lengths]}
    splits = from_arrays(inputs, [x[:, :1] for x in inputs["a"]], per="step")
    config = ExperimentConfig(
        "mine",
        model=ModelConfig(d_model=4, d_state=2, n_layers=1, head_hidden=4),
        pipeline=PipelineConfig(batch_size=8, eval_batch_size=8),
        train=TrainConfig(epochs=1, output=str(tmp_path), monitor="mae"),
    )
    result = fit(config, splits)
    assert set(result.metrics["test"]) == {"loss", "mae", "rmse", "corr"}
    run = load_run(result.run_dir)
    evaluation = run.evaluate("test", splits)
    assert evaluation.metrics == pytest.approx(result.metrics["test"], rel=1e-6)
    assert len(evaluation.logits) == sum(len(sample["label"]) for sample in splits.test)
    with pytest.raises(UserError, match=r"config.data is None"):
        run.evaluate("test")


def test_resolved_configuration(tiny_experiment):
    from cmamba_jax.data import load

    config = dataclasses.replace(tiny_experiment, model=ModelConfig(d_model=20))
    resolved = resolve(config, load(config.data).info)
    assert resolved.model.dt_rank == 3 and resolved.train.loss == "cross_entropy"


@pytest.mark.parametrize(("changes", "message"), [
    ({"train": TrainConfig(monitor="acc")}, "unknown metric 'acc'; expected one of loss, accuracy"),
    ({"train": TrainConfig(loss="l1")}, "'l1' does not fit classification"),
    ({"model": ModelConfig(scan="fast")}, "unknown scan implementation 'fast'"),
    ({"data": SyntheticConfig(length=2)}, "change data.length"),
    ({"data": None}, "config.data is None"),
])  # fmt: skip
def test_mistakes_show_before_there_is_a_run_folder(tmp_path, tiny_experiment, changes, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        fit(dataclasses.replace(tiny_experiment, **{"train": TrainConfig(), **changes}))
    assert not list(tmp_path.iterdir())
