"""`cmamba bench scan --device-table` without an accelerator: what is measured when, and what is kept."""

import json

import jax
import pytest

from cmamba_jax.bench import device_table
from cmamba_jax.errors import UserError

HEAD = {"kind": "device_table", "command": "cmamba bench scan", "device": "a GPU", "versions": "1", "name": "S2_S3"}
TIMES = {"forward_ms": 1.0, "forward_backward_ms": 3.0}


class Measured(list):
    """The sizes that were measured; measuring number `stop` is interrupted."""

    stop = 0

    def __call__(self, implementation, case, repeats):
        self.append((case.B, case.L))
        if len(self) == self.stop:
            raise KeyboardInterrupt
        return dict(TIMES)


@pytest.fixture
def measured(monkeypatch):
    """Measurements on what passes for a GPU."""
    result = Measured()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(device_table, "copy_bandwidth", lambda: 1e12)
    monkeypatch.setattr(device_table, "_measure", result)
    return result


def run(folder, *, sweep=False):
    return device_table.run(("S2", "S3"), sweep, ("chosen",), folder, 5, HEAD)


def test_every_shape_is_measured_and_shown(measured, tmp_path):
    table = run(tmp_path)
    assert measured == [(16, 2048), (4, 4096)]
    assert [line.split()[0] for line in table.splitlines()[-2:]] == ["S2", "S3"]
    saved = json.loads((tmp_path / "device_table.json").read_text())
    assert [record["chosen"] for record in saved["results"]] == [TIMES, TIMES]
    assert (tmp_path / "device_table.png").stat().st_size > 1000


def test_an_interrupted_run_keeps_what_it_has_measured(measured, tmp_path):
    measured.stop = 2
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    saved = json.loads((tmp_path / "device_table.json").read_text())
    assert [record["shape"] for record in saved["results"]] == ["S2"]


def test_the_sweep_keeps_the_number_of_steps_or_the_length(measured, tmp_path):
    run(tmp_path, sweep=True)
    lengths, batches = measured[2:8], measured[8:]
    assert [length for _, length in lengths] == [512, 2048, 8192, 32_768, 131_072, 262_144]
    assert all(batch * length == 32_768 for batch, length in lengths if length <= 32_768)
    assert batches == [(1, 2048), (4, 2048), (16, 2048)]


def test_it_needs_an_accelerator(tmp_path):
    with pytest.raises(UserError, match="needs a GPU or a TPU"):
        run(tmp_path)
