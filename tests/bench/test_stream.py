import json
import subprocess
import sys

import pytest

from cmamba_jax.bench import stream


def test_table(capsys):
    stream.main(["--streams", "1", "2", "--steps", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["streams", "median"] and [line.split()[0] for line in lines[1:3]] == ["1", "2"]
    assert "frame of 4 samples" in lines[3]


def test_one_core_and_its_record():
    command = [sys.executable, "-m", "cmamba_jax", "bench", "stream"]
    command += ["--streams", "1", "--steps", "20", "--cores", "1", "--json"]
    record = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert record["device"].startswith("1 core of ") and record["command"].endswith("--cores 1 --json")
    (result,) = record["results"]
    assert 0 < result["median_ms"] <= result["p99_ms"]
    assert result["stream_steps_per_s"] == pytest.approx(result["steps_per_s"])
