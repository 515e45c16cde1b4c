import dataclasses

import pytest

from cmamba_jax.bench import doctor
from pallas_kernels.coupled_scan import api


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(doctor, "_SIZES", {"M": 2, "B": 1, "L": 5, "D": 3, "N": 4})


def test_a_healthy_machine(capsys):
    assert doctor.examine()
    text = capsys.readouterr().out
    assert "devices: 0 cpu" in text and "used by default: xla" in text
    assert text.count("ok: results") == 6  # xla: three couplings, two dtypes
    assert text.count("not here: it needs a TPU") == 6


def test_a_wrong_implementation_is_found(capsys, monkeypatch):
    right = api.implementations()["xla"]

    def wrong(problem):
        out = right.run(problem)
        return dataclasses.replace(out, y=out.y * 1.05)

    monkeypatch.setattr(
        api, "_IMPLEMENTATIONS", (api.implementations()["reference"], dataclasses.replace(right, run=wrong))
    )
    assert not doctor.examine()
    assert capsys.readouterr().out.count("WRONG") == 6
