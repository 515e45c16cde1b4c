"""The Triton kernels, compiled for GPUs that are not there. Nothing runs."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from pallas_kernels import _compat
from pallas_kernels.coupled_scan.cases import BENCHMARKS, Case

if any(importlib.util.find_spec(name) is None for name in ("triton", "jax_triton")):
    pytest.skip("needs Triton: pip install 'cmamba-jax[triton]'", allow_module_level=True)
if _compat.triton_refusal():
    pytest.skip(_compat.triton_refusal(), allow_module_level=True)

EVERYTHING = dict.fromkeys(("skip", "gate", "dt_bias", "mask", "reset", "initial_state"), True)
JOBS = {
    "S2 for 8.0": (80, BENCHMARKS["S2"]),
    "S1 for 9.0": (90, BENCHMARKS["S1"]),
    "full for 8.0": (80, Case(M=3, B=2, L=70, D=200, N=16, coupling="full", readout="shared", **EVERYTHING)),
    "independent for 8.0": (80, Case(M=2, B=2, L=70, D=5, N=32, coupling="independent", **EVERYTHING)),
}
SCRIPT = pathlib.Path(__file__).with_name("compile_triton.py")


@pytest.fixture(scope="module")
def records():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    jobs = [{"capability": capability, "case": dataclasses.asdict(case)} for capability, case in JOBS.values()]
    process = subprocess.run(
        [sys.executable, SCRIPT], input=json.dumps(jobs), env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr[-2000:]
    lines = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]
    return dict(zip(JOBS, lines, strict=True))


@pytest.mark.parametrize("name", JOBS)
def test_lowers_and_compiles_within_the_limits_of_a_gpu(records, name):
    record = records[name]
    assert record["error"] is None
    assert record["calls"] == 2 and set(record["kernels"]) == {"forward", "backward"}
    for kernel in record["kernels"].values():
        assert kernel["shared"] <= 48 * 1024 and kernel["spilled"] == 0, record
