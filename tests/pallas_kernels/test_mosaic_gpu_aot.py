"""The GPU kernels, compiled by the real compiler for an H100 that is not there. Nothing runs."""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest

from cmamba_jax.bench import topology
from cmamba_jax.bench.tpu_compile import abstract_inputs
from pallas_kernels.coupled_scan.cases import BENCHMARKS, Case
from pallas_kernels.coupled_scan.mosaic_gpu import backward
from pallas_kernels.coupled_scan.mosaic_gpu.plan import Plan
from pallas_kernels.coupled_scan.types import Problem

if not topology.gpu_available():
    pytest.skip(topology.GPU_MISSING, allow_module_level=True)

EVERYTHING = dict.fromkeys(("skip", "gate", "dt_bias", "mask", "reset", "initial_state"), True)
# What the paper trains and a long sequence; then the other couplings, ragged sizes, several slabs of states, cut time.
CASES = {
    "S1": BENCHMARKS["S1"],
    "S2": BENCHMARKS["S2"],
    "S4": BENCHMARKS["S4"],
    "independent": Case(M=2, B=2, L=700, D=72, N=32, coupling="independent", **EVERYTHING),
    "full": Case(M=3, B=2, L=70, D=200, N=128, coupling="full", readout="shared", **EVERYTHING),  # a tight tiling
    "plain": Case(M=1, B=1, L=5, D=3, N=4, dt_softplus=False),
    "narrow": Case(M=4, B=1, L=9, D=72, N=128, dtype="bfloat16", gate=True, mask=True),  # an element a thread and tile
}
KERNELS = {"S1": 2, "S2": 2, "S4": 4, "independent": 4, "full": 2, "plain": 2, "narrow": 2}
SCRIPT = pathlib.Path(__file__).with_name("compile_gpu.py")


@pytest.fixture(scope="module")
def records():
    """Forward and backward of every case, compiled by two processes."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

    def compile_some(names):
        jobs = json.dumps([dataclasses.asdict(CASES[name]) for name in names])
        command = [sys.executable, SCRIPT]
        process = subprocess.run(command, input=jobs, env=environment, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr[-2000:]
        lines = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]
        return dict(zip(names, lines, strict=True))

    with concurrent.futures.ThreadPoolExecutor() as pool:
        halves = pool.map(compile_some, [list(CASES)[0::2], list(CASES)[1::2]])
        return {name: record for half in halves for name, record in half.items()}


@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward_compile(records, name):
    record = records[name]
    assert record["error"] is None
    # Forward and backward; where time is cut, a summary of the chunks before each.
    assert record["kernels"] == KERNELS[name]


def test_the_case_of_a_tight_tiling_is_one():
    case = CASES["full"]
    assert backward.choose_tiling(Plan.of(Problem(**abstract_inputs(case), readout=case.readout))).tight


def test_nothing_of_size_l_times_d_times_n_is_kept(records):
    assert records["S2"]["temp_bytes"] <= 0.10 * records["S2"]["input_bytes"]
    assert records["S4"]["temp_bytes"] <= 0.10 * records["S4"]["input_bytes"]
