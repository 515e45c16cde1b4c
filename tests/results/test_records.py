import pathlib

import jax
import pytest

from cmamba_jax.errors import UserError
from cmamba_jax.results import records
from cmamba_jax.train.runs import read_json, write_json


@pytest.fixture(autouse=True, scope="module")
def _backend_has_read_its_flags():
    jax.devices()


def test_head(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")
    head = records.describe("step", ["bench", "step", "--steps", "3", "--output", "here", "--json"])
    assert head["command"] == "cmamba bench step --steps 3 --json"
    assert head["device"].endswith(" CPU") and "jax" in head["versions"]


def test_the_command_has_the_flags_of_xla(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--a=1 --b=2")
    assert records.describe("step", "bench step")["command"] == "XLA_FLAGS='--a=1 --b=2' cmamba bench step"


def test_records_of_one_benchmark_with_names_are_kept_apart(tmp_path):
    head = {"kind": "scaling", "command": "cmamba", "device": "2 x NVIDIA H100 (gpu)", "versions": "jax 1"}
    for name in ("long", "mosei"):
        records.save(head | {"name": name}, tmp_path / "runs" / name)
    written = [path.name for path in records.collect(tmp_path / "runs", tmp_path / "results")]
    assert written == ["scaling_long_2xnvidia_h100_gpu.json", "scaling_mosei_2xnvidia_h100_gpu.json"]


def test_collected_records_replace_older_ones_of_the_same_kind_and_device(tmp_path):
    runs, store = tmp_path / "runs", tmp_path / "results"
    head = {"kind": "step", "command": "cmamba bench step", "device": "2 cores of x86_64 CPU", "versions": "jax 1"}
    records.save(head | {"ratio": 1}, runs / "bench")
    assert records.collect(runs, store) == [store / "step_x86_64_cpu.json"]
    records.save(head | {"ratio": 2, "device": "4 cores of x86_64 CPU"}, runs / "bench")
    records.collect(runs, store)
    assert [record["ratio"] for record in records.read_all(store)] == [2]
    records.save(head | {"ratio": 3, "device": "NVIDIA H100 (gpu)"}, runs / "bench")
    records.collect(runs, store)
    assert [record["ratio"] for record in records.read_all(store)] == [3, 2]


def test_unfinished_and_foreign_files_are_no_records(tmp_path):
    runs = tmp_path / "runs"
    (runs / "watch").mkdir(parents=True)
    write_json(runs / "watch" / "crossval.json", {"kind": "crossval", "folds": []})
    write_json(runs / "watch" / "step.json", {"kind": "other"})
    write_json(runs / "watch" / "config.json", {})
    assert records.collect(runs, tmp_path / "results") == []


def test_a_file_that_is_no_record(tmp_path):
    write_json(tmp_path / "x.json", {"kind": "step"})
    with pytest.raises(UserError, match="x.json is no record: it lacks command, device, versions"):
        records.read_all(tmp_path)


def test_the_committed_records_are_records():
    found = records.read_all(pathlib.Path(__file__).parents[2] / "results")
    assert found and {record["kind"] for record in found} <= set(records.KINDS)
    assert read_json(pathlib.Path(__file__).parents[2] / "results" / "sweep_watch_fusion.json") in found
