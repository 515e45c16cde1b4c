"""The GPU kernels on a GPU: JAX_PLATFORMS=cuda pytest tests/pallas_kernels/test_mosaic_gpu_device.py

Shapes and properties are drawn afresh in every run; CMAMBA_TEST_SEED repeats one.
"""

import functools
import math
import os
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_coupled_scan as suite

from cmamba_jax.bench.tpu_compile import abstract_inputs
from pallas_kernels import coupled_scan
from pallas_kernels.coupled_scan import mosaic_gpu, triton_gpu
from pallas_kernels.coupled_scan.cases import Case, make_inputs
from pallas_kernels.coupled_scan.mosaic_gpu.plan import Plan
from pallas_kernels.coupled_scan.types import Problem
from pallas_kernels.platform import default_platform

KERNELS = {"mosaic_gpu": mosaic_gpu, "triton": triton_gpu}
SMALLEST = Problem(**make_inputs(Case(M=1, B=1, L=1, D=1, N=4)))
USABLE = [name for name in KERNELS if KERNELS[name].unsupported(SMALLEST, default_platform()) is None]
if not USABLE:
    pytest.skip("needs an NVIDIA GPU (mosaic_gpu: Hopper; triton: jax-triton) and JAX_PLATFORMS=cuda",
                allow_module_level=True)  # fmt: skip

SEED = int(os.environ.get("CMAMBA_TEST_SEED", random.SystemRandom().randrange(2**31)))
SWITCHES = ("dt_softplus", "reverse", "skip", "gate", "dt_bias", "mask", "reset", "initial_state")


def draw(name, index):
    rng = random.Random(SEED + index)
    while True:
        case = Case(
            M=rng.choice((1, 2, 3, 3, 5, 8)),
            B=rng.randint(1, 4),
            L=rng.choice((1, rng.randint(2, 60), rng.randint(61, 700), rng.randint(701, 2000))),
            D=rng.choice((rng.randint(1, 40), rng.randint(41, 200), 8 * rng.randint(8, 40))),
            N=rng.choice((4, 8, 16, 16, 32, 64, 128)),
            dtype=("float32", "bfloat16")[index % 2],
            coupling=("shared", "independent", "full")[index % 3],
            readout=rng.choice(("per_modality", "per_modality", "shared")),
            **{name: rng.random() < 0.6 for name in SWITCHES},
        )
        small = case.M * case.B * case.L * case.D * case.N < 3e7
        options = {name: value for name, value in case.options.items() if name != "reverse"}
        if small and KERNELS[name].limits(Problem(**abstract_inputs(case), **options)) is None:
            return case


RUNNERS = {name: functools.partial(coupled_scan, implementation=name) for name in USABLE}


def scan_and_vjp(name, inputs, *bars, **options):
    return suite._scan_and_vjp(RUNNERS[name], suite._static(options), *suite._split(inputs), *bars)


@pytest.mark.parametrize("name", USABLE)
@pytest.mark.parametrize("index", range(12))
def test_random_cases(name, index):
    case = draw(name, index)
    print(f"CMAMBA_TEST_SEED={SEED}", case)
    suite.test_forward_and_every_gradient(functools.partial(scan_and_vjp, name), case)


# What the benchmarks measure, shorter: nothing masked or reset, one or several slabs of states, wide and narrow blocks.
MEASURED = {"dtype": "bfloat16", "skip": True, "gate": True, "dt_bias": True}
MEASURED_CASES = [
    Case(M=3, B=32, L=50, D=256, N=64, **MEASURED),
    Case(M=3, B=16, L=140, D=640, N=16, **MEASURED),
    Case(M=3, B=4, L=300, D=1024, N=16, **MEASURED),
    Case(M=3, B=1, L=2100, D=128, N=16, **MEASURED),
    Case(M=1, B=4, L=1, D=26, N=64, coupling="independent", skip=True, gate=True, dt_bias=True),
    # Tiles that are contiguous in device memory and end beyond a sample.
    Case(M=1, B=7, L=21, D=64, N=16, coupling="independent", skip=True, gate=True, dt_bias=True),
    # More modalities than the tensor cores take at once, states that do not fill a slab.
    Case(M=5, B=2, L=77, D=200, N=20, mask=True, reset=True, **MEASURED),
    Case(M=4, B=9, L=50, D=1024, N=4, readout="shared", mask=True, initial_state=True, **MEASURED),
    # On the tensor cores: everything at once; fewer modalities, and without a gate.
    Case(M=3, B=2, L=300, D=136, N=16, dtype="bfloat16", **suite.EVERYTHING),
    Case(M=2, B=3, L=141, D=64, N=16, mask=True, **MEASURED),
    Case(M=1, B=3, L=141, D=64, N=16, **MEASURED),
    Case(M=3, B=2, L=150, D=128, N=16, dtype="bfloat16", dt_softplus=False),
    # More than shared memory holds.
    Case(M=8, B=2, L=45, D=72, N=128, coupling="full", **suite.EVERYTHING),
    Case(M=8, B=1, L=300, D=200, N=16, coupling="full", dtype="bfloat16", readout="shared", **suite.EVERYTHING),
    Case(M=7, B=1, L=600, D=40, N=100, coupling="independent", readout="shared", **suite.EVERYTHING),
    # Narrow blocks with tiles of four steps.
    Case(M=4, B=1, L=9, D=72, N=128, mask=True, **MEASURED),
    # Chunks of time with states that do not fill a slab.
    Case(M=3, B=1, L=900, D=40, N=4, **MEASURED),
]


@pytest.mark.parametrize("name", USABLE)
@pytest.mark.parametrize("case", MEASURED_CASES, ids=str)
def test_cases_like_those_of_the_benchmarks(name, case):
    suite.test_forward_and_every_gradient(functools.partial(scan_and_vjp, name), case)


@pytest.mark.skipif("mosaic_gpu" not in USABLE, reason="needs a Hopper GPU")
@pytest.mark.parametrize(
    ("case", "chunks"),
    [
        (Case(M=3, B=2, L=700, D=136, N=16, **MEASURED), 1),
        (Case(M=3, B=1, L=1500, D=136, N=16, dtype="bfloat16", **suite.EVERYTHING), 2),
        (Case(M=2, B=1, L=700, D=136, N=20, coupling="full", **suite.EVERYTHING), 1),
    ],
    ids=str,
)
def test_time_in_segments(case, chunks, monkeypatch):
    monkeypatch.setattr(Plan, "chunks", chunks)
    plan = Plan.of(Problem(**make_inputs(case)))
    chunk = plan.chunk_steps(plan.save)
    assert plan.segment_steps(chunk, plan.save) < chunk
    jax.clear_caches()
    suite.test_forward_and_every_gradient(functools.partial(scan_and_vjp, "mosaic_gpu"), case)
    jax.clear_caches()


@pytest.mark.parametrize("name", USABLE)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("coupling", ["shared", "full"])
def test_garbage_in_masked_places_leaks_nowhere(coupling, dtype, name):
    suite.test_garbage_in_masked_places_leaks_nowhere(functools.partial(scan_and_vjp, name), coupling, jnp.nan, dtype)


@pytest.mark.parametrize("name", USABLE)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_of_small_steps(dtype, name):
    case = Case(M=3, B=2, L=70, D=64, N=16, **MEASURED | {"dtype": dtype})
    inputs, bars = make_inputs(case), suite._cotangents(case)
    inputs["dt_bias"] = jnp.full_like(inputs["dt_bias"], math.log(1e-3))
    found = scan_and_vjp(name, inputs, *bars, **case.options)[1]
    expected = suite._run_oracle(case, inputs)[2](*(np.asarray(bar, np.float64) for bar in bars))
    for key in ("dt", "dt_bias"):
        suite.assert_close(found[key], expected[key], suite.TOLERANCE[dtype][1], key)


@pytest.mark.parametrize("name", USABLE)
def test_same_bits_twice(name):
    case = Case(M=3, B=2, L=300, D=128, N=16, dtype="bfloat16", **suite.EVERYTHING)
    inputs, bars = make_inputs(case), suite._cotangents(case)
    first, second = (jax.tree.leaves(scan_and_vjp(name, inputs, *bars)) for _ in range(2))
    assert all((a == b).all() for a, b in zip(first, second, strict=True))
