import pathlib

import pytest

from cmamba_jax.cli import load_config
from cmamba_jax.config import ExperimentConfig, SweepConfig
from cmamba_jax.errors import UserError
from cmamba_jax.results import readme, records, sweeps

ROOT = pathlib.Path(__file__).parents[2]
HEAD = {"command": "cmamba x", "device": "a card", "versions": "jax 1"}


def test_numbers_of_the_readme_are_those_of_the_records():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    new, count = readme.render(records.read_all(ROOT / "results"), text)
    assert count == len(readme.TABLES)
    assert new == text, "README.md's tables were edited by hand, or are old; run `cmamba results`"


def test_results_are_those_of_the_records(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    configs = {p: load_config(p, kinds=(SweepConfig, ExperimentConfig)) for p in pathlib.Path("configs").rglob("*.py")}
    sweeps.write_results(records.read_all(ROOT / "results"), configs, tmp_path / "RESULTS.md")
    assert (tmp_path / "RESULTS.md").read_text() == pathlib.Path("RESULTS.md").read_text(), "run `cmamba results`"


def test_tables():
    folds = [{"accuracy": 0.8}, {"accuracy": 0.9}]
    crossval = HEAD | {"kind": "crossval", "name": "watch", "monitor": "accuracy", "folds": folds}
    crossval |= {"mean": {"accuracy": 0.85}, "std": {"accuracy": 0.0707}}
    row = {"label": "Coupled", "test": {"loss": 0.5}, "std": {}}
    sweep = HEAD | {"kind": "sweep", "name": "table", "monitor": "loss", "metrics": [], "rows": [row]}
    seeds = HEAD | {"kind": "seeds", "config": "c.py", "seeds": [1, 2], "epochs": 3}
    seeds |= {"apart_seconds": 5.0, "together_seconds": 2.0, "ratio": 2.5}
    step = HEAD | {"kind": "step", "call_ratio": 1.07, "ready_ratio": 1.01}
    streams = [{"streams": 1024, "median_ms": 14.41, "stream_steps_per_s": 56006.2}]
    found = [crossval, sweep, seeds, step, HEAD | {"kind": "stream", "results": streams}]
    text = "a\n<!-- results: experiments -->\nold\n<!-- end -->\nb\n<!-- results: host -->\n<!-- end -->\n"
    new, count = readme.render(found, text)
    assert count == 2 and new.startswith("a\n<!-- results: experiments -->\n| experiment |") and "\nold\n" not in new
    assert "| watch | accuracy 85.0 ± 7.1 (folds 80.0, 90.0) | `cmamba x` |" in new
    assert "| table | loss: Coupled 0.500 | `cmamba x` |" in new
    assert "| 5 s against 2 s: 2.50 times | `cmamba x` | a card; jax 1 |" in new
    assert "1.07 times until the call returns, 1.01 until" in new
    assert "1,024: 14.4 ms, 56,006 answers a second" in new
    assert readme.render(found, new) == (new, 2)


def test_efficiency_says_what_the_coupled_model_saves_and_what_did_not_fit():
    def pair(own, other):
        return {"coupled": own, "cross_attention": other}

    size = {"memory_bytes": 2**20}
    short = pair(size | {"ms": 10.0}, {"memory_bytes": 4 * 2**20, "ms": 40.0})
    long = pair(size | {"ms": 20.0}, {"memory_bytes": 8000 * 2**20, "error": "out of memory"})
    record = HEAD | {"kind": "efficiency", "batch": 1, "dtype": "float32", "repeats": 5}
    record["models"] = pair({"d_model": 4, "parameters": 1000}, {"d_model": 3, "parameters": 1010})
    record["results"] = [{"length": 500, "inference": short}, {"length": 65_536, "inference": long}]
    new, _ = readme.render([record], "<!-- results: efficiency -->\n<!-- end -->\n")
    assert "parameters: coupled 1,000, cross-attention 1,010" in new and "memory by the compiler; a card; jax 1" in new
    assert "| 500 | 1 / 4 | 75.0% | 10 / 40 | 75.0% |" in new
    assert "| 65,536 | 1 / 8,000 | 100.0% | 20 / out of memory | - |" in new


def test_one_table_for_all_shapes_measured_on_a_device():
    def record(shape, **rows):
        case = {"B": 1, "L": 2, "D": 3, "N": 4}
        result = {"shape": shape, "case": case, "floor_ms": {"exp": 0.5, "bytes": 0.25}, **rows}
        return HEAD | {"kind": "device_table", "name": shape, "repeats": 9, "results": [result]}

    ours = {"implementation": "mosaic_gpu", "forward_ms": 1.0, "forward_backward_ms": 4.0}
    ours |= {"forward_backward_temp_bytes": 3, "input_bytes": 10}
    found = [record("S1", chosen=ours, peer={"error": "ValueError"}), record("S2", chosen={"forward_ms": 2.0})]
    new, _ = readme.render(found, "<!-- results: device -->\n<!-- end -->\n")
    assert new.count("| scan |") == 1 and "`cmamba x`, `cmamba x`: M 3" in new and "medians of 9; a card; jax 1" in new
    assert "| S1 (1, 2, 3, 4) | mosaic_gpu | 1.00 | 4.00 | 0.50 | 30% |" in new and "peer" not in new
    assert "| S2 (1, 2, 3, 4) | chosen | 2.00 | failed | 0.25 |  |" in new


def test_scaling_shows_memory_by_the_device_where_it_counts():
    model = {"d_model": 8, "d_state": 4, "n_layers": 2, "compute_dtype": "bfloat16"}
    one = {"steps_per_second": 4.0, "efficiency": 1.0, "memory_bytes": 2**20, "peak_bytes": None, "sent_bytes": 0}
    two = one | {"efficiency": 0.5, "peak_bytes": 3 * 2**20, "sent_bytes": 2**19}
    case = {"case": "long", "axis": "sequence", "length": 2048, "batch": 1, "model": model}
    record = HEAD | {"kind": "scaling", "name": "long", "cases": [case | {"results": {"1": one, "2": two}}]}
    new, _ = readme.render([record], "<!-- results: scaling -->\n<!-- end -->\n")
    assert (
        "| long: axis sequence, 2,048 steps, batch 1, width 8, 4 states, 2 layers, bfloat16 | 1 | 4.0 | 1.00 | 1 |"
        in new
    )
    assert "| 2 | 4.0 | 0.50 | 3 | 0.5 | `cmamba x` | a card; jax 1 |" in new


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- results: sped -->\n<!-- end -->", "there is no table 'sped'; expected one of experiments, "),
        ("<!-- results: scan -->\n", "1 tables begin .* 0 of them end"),
    ],
)
def test_marks_that_do_not_fit(text, message):
    with pytest.raises(UserError, match=message):
        readme.render([], text)
