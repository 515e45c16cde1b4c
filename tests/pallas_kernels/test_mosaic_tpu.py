"""The TPU kernels, interpreted on a CPU: against the float64 oracle, and for races and reads out of bounds.

What the TPU compiler makes of them: test_mosaic_tpu_aot.py. XLA:CPU takes seconds to compile an interpreted kernel, so
the cases are few and chosen to meet every pair of properties.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_coupled_scan as suite
from jax.experimental.pallas import tpu as pltpu

from cmamba_jax.bench.tpu_compile import abstract_inputs
from pallas_kernels import UnsupportedError, choose_implementation, coupled_scan
from pallas_kernels.coupled_scan import api, cases, mosaic_tpu
from pallas_kernels.coupled_scan.cases import Case, make_inputs
from pallas_kernels.coupled_scan.mosaic_tpu import plan as plan_module
from pallas_kernels.coupled_scan.types import Problem

SWITCHES = ("dt_softplus", "reverse", "skip", "gate", "dt_bias", "mask", "reset", "initial_state")
# N: part of a register, one, two; L: one step, a tile that is not full, two tiles; D: one register, two.
VALUES = {
    "coupling": ("independent", "shared", "full"),
    "M": (1, 2, 3),
    "N": (4, 8, 16),
    "L": (1, 21, 130),
    "readout": ("per_modality", "shared"),
    "dtype": ("float32", "bfloat16"),
    "D": (2, 130),
    "B": (1, 2),
} | dict.fromkeys(SWITCHES, (False, True))
TINY = Case(M=2, B=2, L=3, D=2, N=4, **suite.EVERYTHING)


def run(*, interpret=True, **arguments):
    """`coupled_scan` by the interpreted kernels."""
    entry = dataclasses.replace(
        api.implementations()["mosaic_tpu"],
        run=functools.partial(mosaic_tpu.scan, interpret=interpret),
        unsupported=lambda problem, platform: mosaic_tpu.unsupported(problem, "tpu"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "_IMPLEMENTATIONS", (entry,))
        return coupled_scan(**arguments, implementation="mosaic_tpu")


def scan_and_vjp(inputs, *bars, **options):
    return suite._scan_and_vjp(run, suite._static(options), *suite._split(inputs), *bars)


@pytest.mark.parametrize("case", [Case(**row) for row in cases._cover_pairs(VALUES, seed=0)], ids=str)
def test_forward_and_every_gradient(case):
    suite.test_forward_and_every_gradient(scan_and_vjp, case)


def test_eight_steps_an_iteration_as_on_a_tpu(monkeypatch):
    monkeypatch.setattr(plan_module, "INTERPRETED_STEPS", plan_module.STEPS)
    case = Case(M=2, B=1, L=19, D=2, N=8, **suite.EVERYTHING)
    suite.test_forward_and_every_gradient(lambda *args, **options: scan_and_vjp(*args, **options), case)


def test_many_modalities_and_states():
    suite.test_forward_and_every_gradient(scan_and_vjp, Case(M=8, B=1, L=5, D=2, N=128, skip=True, reset=True))


def test_several_blocks_of_channels_and_samples_of_a_part():
    case = Case(M=1, B=4, L=3, D=600, N=8, **suite.EVERYTHING)
    suite.test_forward_and_every_gradient(scan_and_vjp, case)


@pytest.mark.parametrize("coupling", ["shared", "full"])
def test_masked_steps_leave_no_trace(coupling):
    suite.test_state_passes_untouched_where_every_modality_is_masked(scan_and_vjp, coupling)
    suite.test_garbage_in_masked_places_leaks_nowhere(scan_and_vjp, coupling, np.nan, "float32")


@pytest.mark.parametrize("coupling", ["independent", "shared", "full"])
def test_no_races_and_no_reads_out_of_bounds(coupling, capfd):
    """Uninitialised memory is NaN, reads out of bounds raise, two cores share the "parallel" grid axes."""
    interpret = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    case = dataclasses.replace(TINY, coupling=coupling)
    actual = _gradients(case, interpret)
    assert "race" not in capfd.readouterr().out.lower()
    jax.tree.map(functools.partial(suite.assert_close, tolerance=1e-6), actual, _gradients(case, True))


def test_the_race_detector_sees_a_sequential_axis_called_parallel(capfd, monkeypatch):
    params = pltpu.CompilerParams
    monkeypatch.setattr(
        pltpu,
        "CompilerParams",
        lambda dimension_semantics, **options: params(
            dimension_semantics=("parallel",) * len(dimension_semantics), **options
        ),
    )
    interpret = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    try:
        _gradients(Case(M=1, B=3, L=1, D=2, N=4), interpret)
    except jax.errors.JaxRuntimeError as error:  # JAX 0.12 raises, 0.10 prints
        message = str(error)
    else:
        message = capfd.readouterr().out
    assert "race" in message.lower()


def _gradients(case, interpret):
    inputs = make_inputs(case)
    floats, switches = suite._split(inputs)
    out, vjp = jax.vjp(lambda floats: run(interpret=interpret, **floats, **switches, **case.options), floats)
    gradients = vjp(jax.tree.map(jnp.ones_like, out))
    return jax.block_until_ready((out, gradients))


def test_chosen_on_a_tpu_where_it_can_be():
    problem = Problem(**make_inputs(TINY))
    assert choose_implementation(problem, "tpu").name == "mosaic_tpu"
    half = dataclasses.replace(problem, x=problem.x.astype(jnp.float16))
    choice = choose_implementation(half, "tpu")
    assert choice.name == "xla" and "x is float16" in choice.reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"M": 9}, "up to 8 modalities and 128 states, got M=9"),
        ({"N": 136}, "up to 8 modalities and 128 states, got M=2, N=136"),
        ({"D": 2**17}, r"M \* D \* \(N \+ 16\) may be at most 1179648, got 2 \* 131072 \* \(4 \+ 16\)"),
    ],
)
def test_says_what_it_cannot_do(changes, reason):
    problem = Problem(**abstract_inputs(Case(**{"M": 2, "B": 1, "L": 1, "D": 2, "N": 4} | changes)))
    assert re.search(reason, mosaic_tpu.unsupported(problem, "tpu"))


def test_forced_without_a_tpu_it_says_so():
    with pytest.raises(UnsupportedError, match="needs a TPU, the default device is a cpu; use implementation='xla'"):
        coupled_scan(**make_inputs(TINY), implementation="mosaic_tpu")
