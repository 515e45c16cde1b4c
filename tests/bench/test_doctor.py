import dataclasses

import pytest

from cmamba_jax.bench import doctor
from pallas_kernels import causal_conv
from pallas_kernels.causal_conv import mosaic_gpu, xla
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
    assert text.count("convolution  float32   not here: it needs an NVIDIA GPU") == 1
    assert "convolution used by default: xla" in text


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


@pytest.mark.parametrize("error", [0.0, 0.05])
def test_a_wrong_convolution_is_found(error, capsys, monkeypatch):
    def kernel(interpret, *arrays):
        return (1 + error) * xla.conv_silu(*arrays)

    monkeypatch.setattr(causal_conv, "unsupported", lambda *_: None)
    monkeypatch.setattr(mosaic_gpu, "conv_silu", kernel)
    assert doctor._examine_convolution() == (error == 0)
    assert capsys.readouterr().out.count("WRONG" if error else "ok: results") == 2
