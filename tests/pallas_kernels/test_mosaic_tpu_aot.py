"""The TPU kernels, compiled by the real TPU compiler for chips that are not there. Nothing runs.

The compiler works in processes of its own: it reads its settings when JAX is imported.
"""

import concurrent.futures
import dataclasses
import re

import pytest

from cmamba_jax.bench import tpu_compile, tpu_static
from cmamba_jax.bench.tpu_compile import Job, compile_all
from pallas_kernels.coupled_scan.cases import BENCHMARKS, Case
from pallas_kernels.coupled_scan.mosaic_tpu.plan import VMEM_LIMIT, Plan
from pallas_kernels.coupled_scan.types import Problem

if not tpu_compile.available():
    pytest.skip(tpu_compile.MISSING, allow_module_level=True)

EVERYTHING = dict.fromkeys(("skip", "gate", "dt_bias", "mask", "reset", "initial_state"), True)
# What S1 to S4 leave out: the other couplings, masks and resets, ragged sizes, many modalities and states.
OTHERS = {
    "independent": Case(M=3, B=2, L=200, D=384, N=16, coupling="independent", **EVERYTHING),
    "full": Case(M=2, B=3, L=70, D=200, N=8, dtype="bfloat16", coupling="full", readout="shared", **EVERYTHING),
    "shared": Case(M=3, B=2, L=300, D=300, N=4, dtype="bfloat16", reverse=True, **EVERYTHING),
    "many": Case(M=8, B=1, L=256, D=1024, N=128, coupling="independent", **EVERYTHING),
    "wide": Case(M=3, B=1, L=256, D=12_288, N=16, coupling="independent", **EVERYTHING),
}
CASES = {
    f"{name}-{dtype}": dataclasses.replace(BENCHMARKS[name], dtype=dtype)
    for name in ("S1", "S2", "S3", "S4")
    for dtype in ("bfloat16", "float32")
} | OTHERS
# v5e has the least HBM, tpu7x the least VMEM: they compile everything, the other chips what is measured.
KEYS = [
    (chip, name) for chip in tpu_compile.TOPOLOGIES for name in CASES if chip in ("v5e", "tpu7x") or "bfloat16" in name
]


@pytest.fixture(scope="module")
def records():
    """Forward and backward of every case for every chip, compiled by two processes."""
    halves = [KEYS[0::2], KEYS[1::2]]
    jobs = [[Job(chip, dataclasses.asdict(CASES[name])) for chip, name in half] for half in halves]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        results = pool.map(compile_all, jobs)
        return {
            key: record
            for half, result in zip(halves, results, strict=True)
            for key, record in zip(half, result, strict=True)
        }


@pytest.mark.parametrize(("chip", "name"), KEYS)
def test_forward_and_backward_compile_within_memory(records, chip, name):
    record = records[chip, name]
    assert record["error"] is None
    kernels = [line for line in record["text"].splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    assert len(kernels) == 2
    for line in kernels:
        # XLA may keep arrays of its own below the region it gives to the kernel.
        region = re.search(r'[^_]"?scoped_memory_configs":\[\{"memory_space":"1","offset":"(\d+)"', line)
        used = re.search(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"0","size":"(\d+)"', line)
        assert int(used[1]) - int(region[1]) <= VMEM_LIMIT
    if name not in OTHERS:
        # What the forward pass keeps for the backward pass may lie in VMEM or in a result that is not written yet,
        # where XLA does not call it temporary.
        plan = Plan.of(Problem(**tpu_compile.abstract_inputs(CASES[name])))
        kept = 4 * (plan.tiles - 1) * plan.chains * plan.B * plan.states * plan.D
        assert max(record["temp_bytes"], kept) <= 0.1 * record["input_bytes"]


@pytest.mark.parametrize(
    ("case", "width", "message"),
    [
        pytest.param({"M": 8, "L": 128, "D": 8192}, 8192, "vmem", id="too much VMEM"),
        pytest.param({"B": 1024}, 128, "hbm", id="too much HBM"),
        pytest.param({"dtype": "float16"}, 128, "float16|f16", id="float16"),
        pytest.param({"D": 200}, 100, "128", id="blocks that are no multiple of 128 lanes"),
    ],
)
def test_the_compiler_rejects_bad_kernels(case, width, message):
    case = {"M": 3, "B": 2, "L": 2048, "D": 1024, "N": 16, "dtype": "bfloat16"} | case
    (record,) = compile_all([Job("v5e", case, "loop", width)])
    assert record["error"] and re.search(message, record["error"], re.IGNORECASE)


def test_inner_loop_is_three_times_shorter_than_the_plain_one(tmp_path):
    case = BENCHMARKS["S2"]
    plain = dataclasses.asdict(dataclasses.replace(case, skip=False, gate=False, dt_bias=False))
    records = compile_all([Job("v5e", dataclasses.asdict(case), "forward"), Job("v5e", plain, "loop", 128)], tmp_path)
    assert [record["error"] for record in records] == [None, None]
    ours = tpu_static.read_schedule(tmp_path, "coupled_scan_forward").loops["walk"]
    loop = tpu_static.read_schedule(tmp_path, "plain_loop").loops["walk"]
    # An iteration of ours does 8 steps of 512 channels, one of the plain loop 1 step of 128.
    assert ours.bundles / 32 <= loop.bundles / 3
