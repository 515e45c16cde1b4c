import dataclasses
import json

import pytest
import tiny

from cmamba_jax.bench import step


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(step, "_MODEL", dataclasses.replace(step._MODEL, d_model=4, n_layers=1, scan="reference"))
    with tiny.quick_compilation():
        yield


def test_both_do_the_same_update_and_are_timed():
    result = step.measure(3)
    for name in ("package", "hand_written"):
        assert 0 < result[name]["call_ms"] <= result[name]["ready_ms"]
    assert result["call_ratio"] == result["package"]["call_ms"] / result["hand_written"]["call_ms"]
    assert result["arrays"] > 20
    # By the fifth step, leaving out clipping or L2, or another b2, makes 1e-4.
    assert result["package"]["loss"] == pytest.approx(result["hand_written"]["loss"], rel=1e-5)


def test_table_and_json(capsys, monkeypatch):
    times = {"call_ms": 2.0, "ready_ms": 3.0}
    result = {"package": times, "hand_written": times, "call_ratio": 1.0, "ready_ratio": 1.0, "arrays": 4}
    monkeypatch.setattr(step, "measure", lambda steps: result)
    step.main(["--steps", "3"])
    assert "package" in (table := capsys.readouterr().out) and "hand-written" in table and "ratio" in table
    step.main(["--json"])
    record = json.loads(capsys.readouterr().out)
    assert record["command"].endswith("cmamba bench step --json") and record.items() >= result.items()
