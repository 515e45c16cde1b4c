import csv
import dataclasses
import pathlib

import pytest

from cmamba_jax.config import ExperimentConfig, MissingConfig, SweepConfig, SweepRow
from cmamba_jax.errors import UserError
from cmamba_jax.results import records, sweeps
from cmamba_jax.train import sweep
from cmamba_jax.train.experiment import RunResult
from cmamba_jax.train.seeds import SeedsResult


@pytest.fixture
def plan(tiny_experiment, tmp_path):
    train = dataclasses.replace(tiny_experiment.train, output=str(tmp_path), seeds=(1, 2))
    rows = (
        SweepRow("Coupled", paper="81.8"),
        SweepRow("Mamba, no coupling", (("model.coupling", "independent"),)),
        SweepRow("Attention", (("model.coupling", "cross_attention"), ("model.n_heads", 1))),
    )
    return SweepConfig(
        "table", dataclasses.replace(tiny_experiment, train=train), rows, metrics=("accuracy", "loss"), note="Tiny."
    )


@pytest.fixture
def fits(monkeypatch):
    """Replaces `fit_seeds`: the configurations that it was called with; a call numbered in `fail` is interrupted."""
    calls, fail = [], set()

    def fit_seeds(config):
        folder = pathlib.Path(config.train.run_dir)
        calls.append(config)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").touch()
        if len(calls) in fail:
            raise KeyboardInterrupt
        metrics = {"loss": 0.5, "accuracy": 0.8125}
        run = RunResult(folder, {"test": metrics, "valid": metrics}, folder)
        mean, std = {"test": metrics, "valid": metrics}, {"test": {"loss": 0.25, "accuracy": 0.03}, "valid": metrics}
        return SeedsResult(folder, [run, run], mean, std, {"accuracy": [0.84, 0.86]} if config.train.track_test else {})

    monkeypatch.setattr(sweep, "fit_seeds", fit_seeds)
    return calls, fail


def run(plan):
    return sweep.run_sweep(plan, command="sweep x.py", message=lambda text: None)


def test_tables(plan, fits):
    result = run(plan)
    parameters = [f"{row['parameters']:,}" for row in result.rows]
    assert result.table.splitlines() == [
        "|  | parameters | accuracy | loss | validation loss | paper |",
        "|---|---|---|---|---|---|",
        f"| Coupled | {parameters[0]} | 81.2 ± 3.0 | 0.500 ± 0.250 | 0.500 | 81.8 |",
        f"| Mamba, no coupling | {parameters[1]} | 81.2 ± 3.0 | 0.500 ± 0.250 | 0.500 |  |",
        f"| Attention | {parameters[2]} | 81.2 ± 3.0 | 0.500 ± 0.250 | 0.500 |  |",
    ]
    assert (result.folder / "table.md").read_text() == result.table
    rows = list(csv.DictReader((result.folder / "table.csv").open()))
    assert [row["label"] for row in rows] == [row.label for row in plan.rows]
    assert float(rows[0]["accuracy"]) == 0.8125 and float(rows[0]["accuracy_std"]) == 0.03


def test_finished_rows_are_kept_and_an_unfinished_one_is_resumed(plan, fits):
    calls, fail = fits
    fail.add(2)
    with pytest.raises(KeyboardInterrupt):
        run(plan)
    assert "Coupled" in (pathlib.Path(plan.base.train.output) / "table" / "table.md").read_text()
    result = run(plan)
    folders = [(pathlib.Path(c.train.run_dir).name, c.train.resume) for c in calls]
    assert folders == [
        ("coupled", False), ("mamba_no_coupling", False), ("mamba_no_coupling", True), ("attention", False)
    ]  # fmt: skip
    assert run(plan).rows == result.rows and len(calls) == 4
    more = dataclasses.replace(plan, rows=(*plan.rows, SweepRow("Full", (("model.coupling", "full"),))))
    assert len(run(more).rows) == 4 and len(calls) == 5
    other = dataclasses.replace(plan, base=sweep.apply(plan.base, [("model.d_state", 3)]))
    with pytest.raises(UserError, match="row 'Coupled' with other settings"):
        run(other)


def test_equal_parameters(plan, fits):
    base = sweep.apply(plan.base, [("model.d_model", 16)])
    result = run(dataclasses.replace(plan, base=base, widths="equal_parameters"))
    sizes = [row["parameters"] for row in result.rows]
    assert max(abs(size / sizes[0] - 1) for size in sizes) <= 0.05
    assert [c.model.d_model for c in fits[0]] == [row["d_model"] for row in result.rows]
    assert len({row["d_model"] for row in result.rows}) > 1


def test_some_rows_now_and_others_later(plan, fits, tmp_path):
    result = sweep.run_sweep(plan, only=["attention"], message=lambda text: None)
    assert [row["label"] for row in result.rows] == ["Attention"]
    records.collect(tmp_path, tmp_path / "results")
    sweeps.write_results(records.read_all(tmp_path / "results"), {pathlib.Path("a.py"): plan}, tmp_path / "RESULTS.md")
    assert "Rows not run: Coupled; Mamba, no coupling." in (tmp_path / "RESULTS.md").read_text()
    assert [row["label"] for row in run(plan).rows] == [row.label for row in plan.rows] and len(fits[0]) == 3
    with pytest.raises(UserError, match="no row atention; the rows are coupled, mamba_no_coupling, attention"):
        sweep.run_sweep(plan, only=["atention"])


def test_grid_is_the_product():
    rows = sweep.grid({"model.d_state": (8, 16), "train.seed": (1, 2)})
    assert [row.changes for row in rows] == [
        (("model.d_state", d), ("train.seed", s)) for d in (8, 16) for s in (1, 2)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ((("model.d_stat", 3),), r"no field 'model.d_stat'; did you mean 'd_state'"),
        ((("model.d_state.x", 3),), "no field 'model.d_state.x'"),
        ((("model.coupling", "weak"),), "model.coupling has to be one of"),
    ],
)
def test_changes_that_do_not_fit(changes, message):
    with pytest.raises(UserError, match=message):
        sweep.apply(ExperimentConfig("x"), changes)


def test_labels_have_to_differ(plan, fits):
    with pytest.raises(UserError, match="different labels"):
        run(dataclasses.replace(plan, rows=(SweepRow("A b"), SweepRow("a-b"))))


def test_scores_with_missing_data_are_means_over_the_runs_of_a_row(tiny_run):
    kinds = (MissingConfig("element", 0.0), MissingConfig("modality", 0.9))
    whole, part = sweep._score_missing(tiny_run.run_dir.parent, kinds)
    assert (whole["kind"], whole["rate"], part["kind"], part["rate"]) == ("element", 0.0, "modality", 0.9)
    assert whole["test"] == pytest.approx(tiny_run.metrics["test"])
    assert part["test"]["loss"] != whole["test"]["loss"]
    row = {"label": "Coupled", "missing": [whole, part]}
    table = sweep._missing_table([row, {"label": "old", "missing": []}], "accuracy")
    shares = [f"{100 * score['test']['accuracy']:.1f}" for score in (whole, part)]
    assert table[-3] == "|  | element 0 | modality 0.9 |"
    assert table[-1] == f"| Coupled | {shares[0]} | {shares[1]} |"


def test_results_list_what_was_run_and_what_was_not(plan, fits, tmp_path):
    tracked = sweep.apply(plan.base, [("train.track_test", True)])
    run(dataclasses.replace(plan, base=tracked))
    other = SweepConfig("ablation", plan.base, (SweepRow("d_state 64", paper="85.6"), SweepRow("no paper")))
    single = ExperimentConfig("mosei", paper="Table 1: 85.6")
    configs = {pathlib.Path("configs/a.py"): plan, pathlib.Path("configs/b.py"): other, pathlib.Path("c.py"): single}
    configs[pathlib.Path("own.py")] = ExperimentConfig("own")
    records.collect(tmp_path, tmp_path / "results")
    found = records.read_all(tmp_path / "results")
    assert all("settings" not in row for row in found[0]["rows"])
    assert sweeps.write_results(found, configs, tmp_path / "RESULTS.md") == (1, 2)
    run_here, not_run = (tmp_path / "RESULTS.md").read_text().split("## Not run here")
    assert "### table" in run_here and "cmamba sweep x.py`; 2 seeds a row" in run_here
    assert "| accuracy, epoch chosen on test | paper |" in run_here and "| 85.0 | 81.8 |" in run_here
    assert "| `configs/b.py` | d_state 64: 85.6 |" in not_run and "| `c.py` | Table 1: 85.6 |" in not_run
    assert f"\n{plan.note}\n" in run_here
    assert "configs/a.py" not in not_run and "own.py" not in not_run
