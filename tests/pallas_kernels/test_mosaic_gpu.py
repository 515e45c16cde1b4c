"""The GPU kernels, interpreted on a CPU, against the float64 oracle.

What the GPU compiler makes of them: test_mosaic_gpu_aot.py; on a GPU: test_mosaic_gpu_device.py. XLA:CPU takes many
seconds to compile an interpreted kernel, so the cases are few.
"""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_coupled_scan as suite

from cmamba_jax.bench.tpu_compile import abstract_inputs
from pallas_kernels import UnsupportedError, choose_implementation, coupled_scan
from pallas_kernels._compat import interpret_params
from pallas_kernels.coupled_scan import api, mosaic_gpu
from pallas_kernels.coupled_scan.cases import Case, make_inputs
from pallas_kernels.coupled_scan.mosaic_gpu import backward, blocks, forward
from pallas_kernels.coupled_scan.mosaic_gpu.plan import Plan
from pallas_kernels.coupled_scan.types import Problem

EVERYTHING = suite.EVERYTHING


def run(**arguments):
    """`coupled_scan` by the interpreted kernels."""
    entry = dataclasses.replace(
        api.implementations()["mosaic_gpu"],
        run=functools.partial(mosaic_gpu.scan, interpret=interpret_params()),
        unsupported=lambda problem, platform: mosaic_gpu.limits(problem),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "_IMPLEMENTATIONS", (entry,))
        return coupled_scan(**arguments, implementation="mosaic_gpu")


def scan_and_vjp(inputs, *bars, **options):
    return suite._scan_and_vjp(run, suite._static(options), *suite._split(inputs), *bars)


# Sizes that fill blocks and tiles, in every version of JAX.
WHOLE = [
    Case(M=2, B=1, L=16, D=64, N=16, **EVERYTHING),
    # Several slabs of states.
    Case(M=2, B=1, L=16, D=64, N=20, coupling="full", readout="shared", **EVERYTHING),
    # On the tensor cores.
    Case(M=4, B=1, L=16, D=64, N=16, dtype="bfloat16", readout="shared", **EVERYTHING),
]
RAGGED = [
    Case(M=1, B=2, L=8, D=5, N=4, dtype="bfloat16", coupling="independent", dt_softplus=False, reverse=True),
    Case(M=2, B=1, L=19, D=70, N=16, **EVERYTHING),
    # On the tensor cores.
    Case(M=3, B=2, L=19, D=70, N=12, dtype="bfloat16", **EVERYTHING),
    Case(M=1, B=1, L=11, D=64, N=16, dtype="bfloat16", gate=True),
]
needs_ragged_copies = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the interpreter of JAX 0.10 drops copies that reach beyond an array"
)


@pytest.mark.parametrize("case", [*WHOLE, *(pytest.param(c, marks=needs_ragged_copies) for c in RAGGED)], ids=str)
def test_forward_and_every_gradient(case):
    suite.test_forward_and_every_gradient(scan_and_vjp, case)


@needs_ragged_copies
def test_garbage_in_masked_places_leaks_nowhere():
    suite.test_garbage_in_masked_places_leaks_nowhere(scan_and_vjp, "shared", jnp.nan, "bfloat16")


@needs_ragged_copies
@pytest.mark.parametrize(
    ("coupling", "dtype", "sizes", "length", "segment"),
    [
        # The last segment of a chunk is shorter, or the last chunk lacks one.
        ("shared", "float32", {"M": 2, "N": 4}, 77, 32),
        ("shared", "bfloat16", {"M": 3, "N": 4}, 77, 32),  # on the tensor cores, both ways
        ("shared", "bfloat16", {"M": 3, "N": 4}, 39, 16),
        ("independent", "float32", {"M": 2, "N": 4}, 39, 16),
        ("full", "float32", {"M": 2, "N": 20}, 77, 32),  # with little shared memory
    ],
)
def test_time_in_chunks_segments_and_stretches(coupling, dtype, sizes, length, segment, monkeypatch):
    monkeypatch.setattr(Plan, "save", 16)
    monkeypatch.setattr(Plan, "chunks", property(lambda plan: 1 if plan.coupling == "full" else 2))
    monkeypatch.setattr(Plan, "segment_steps", lambda plan, chunk, multiple: segment)
    if coupling == "full":
        monkeypatch.setattr(blocks, "choose_tiling", lambda plan, scratch, choices: blocks.Tiling(*choices[-1], True))
    case = Case(B=1, L=length, D=3, coupling=coupling, dtype=dtype, **sizes, **EVERYTHING)
    chunk = Plan.of(Problem(**make_inputs(case))).chunk_steps(16)
    assert segment < chunk and (chunk < length) == (coupling != "full")
    jax.clear_caches()
    suite.test_forward_and_every_gradient(scan_and_vjp, case)
    jax.clear_caches()


@needs_ragged_copies
def test_states_that_only_fill_a_slab_up_do_not_overflow(monkeypatch):
    monkeypatch.setattr(Plan, "chunks", 2)
    case = Case(M=3, B=1, L=190, D=8, N=4, dtype="bfloat16", gate=True)  # 3 ** 96 is beyond float32
    jax.clear_caches()
    suite.test_forward_and_every_gradient(scan_and_vjp, case)
    jax.clear_caches()


@needs_ragged_copies
def test_a_batch_of_problems_whose_time_is_cut_into_segments(monkeypatch):
    monkeypatch.setattr(Plan, "save", 16)
    monkeypatch.setattr(Plan, "segment_steps", lambda plan, chunk, multiple: 16)
    inputs = make_inputs(Case(M=2, B=1, L=32, D=64, N=4))
    x = jnp.stack([inputs["x"], 2 * inputs["x"]])

    def gradient(x):
        return jax.grad(lambda x: jnp.sum(run(**(inputs | {"x": x})).y ** 2))(x)

    jax.clear_caches()
    np.testing.assert_allclose(jax.vmap(gradient)(x), jnp.stack([gradient(v) for v in x]), rtol=1e-5)
    jax.clear_caches()


@needs_ragged_copies
def test_uncoupled_modalities_that_would_be_tight_together_are_scanned_one_by_one(monkeypatch):
    case = Case(M=2, B=1, L=3, D=2, N=4, coupling="independent", **EVERYTHING)
    choose, split, scanned = backward.choose_tiling, mosaic_gpu._modality, []
    monkeypatch.setattr(backward, "choose_tiling", lambda plan: choose(plan)._replace(tight=plan.M > 1))
    monkeypatch.setattr(mosaic_gpu, "_modality", lambda p, m: scanned.append(m) or split(p, m))
    suite.test_forward_and_every_gradient(scan_and_vjp, case)
    assert set(scanned) == {0, 1}


def test_time_is_cut_only_where_multiprocessors_would_idle():
    def chunks(**sizes):
        return Plan.of(Problem(**abstract_inputs(Case(**({"M": 3, "D": 1024, "N": 16} | sizes))))).chunks

    assert chunks(B=16, L=2048) == 1
    assert chunks(B=1, L=65_536) == 16
    assert chunks(B=1, L=1000) == 3
    assert chunks(B=1, L=65_536, coupling="full") == 1


def test_narrow_blocks_where_wide_ones_leave_multiprocessors_idle():
    def channels(**sizes):
        plan = Plan.of(Problem(**abstract_inputs(Case(**({"M": 3, "D": 1024, "N": 16} | sizes)))))
        return plan.forward().threads.channels, plan.threads.channels

    assert channels(B=16, L=2048) == (64, 64)
    assert channels(B=4, L=4096) == (32, 64)
    assert channels(B=4, L=4096, N=32) == (32, 64)
    assert channels(B=4, L=4096, D=32) == (64, 64)
    assert channels(B=1, L=65_536) == (64, 64)
    assert channels(B=1, L=65_536, coupling="full") == (32, 64)


def test_what_goes_backwards_on_the_tensor_cores():
    def tensor(**changes):
        case = Case(**({"M": 3, "B": 2, "L": 9, "D": 64, "N": 16, "dtype": "bfloat16", "gate": True} | changes))
        return Plan.of(Problem(**abstract_inputs(case))).backward().threads.tensor

    assert tensor() and tensor(M=1) and tensor(M=4, N=4, mask=True, readout="shared")
    others = {"M": 5}, {"N": 20}, {"gate": False}, {"dtype": "float32"}, {"coupling": "full"}
    assert not any(tensor(**changes) for changes in others)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"M": 9}, "up to 8 modalities and 128 states, got M=9"),
        ({"N": 136}, "up to 8 modalities and 128 states, got M=2, N=136"),
    ],
)
def test_says_what_it_cannot_do(changes, reason):
    problem = Problem(**abstract_inputs(Case(**{"M": 2, "B": 1, "L": 1, "D": 2, "N": 4} | changes)))
    assert re.search(reason, mosaic_gpu.limits(problem))


@pytest.mark.parametrize("coupling", ["shared", "independent", "full"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_number_of_modalities_and_states_fits(coupling, dtype):
    for M, N in itertools.product(range(1, 9), range(16, 129, 16)):
        case = Case(M=M, B=2, L=300, D=128, N=N, coupling=coupling, dtype=dtype, readout="shared", **EVERYTHING)
        plan = Plan.of(Problem(**abstract_inputs(case), readout="shared"))
        backward.choose_tiling(plan)
        forward.choose_tiling(plan.forward())


def test_forced_without_a_gpu_it_says_so():
    with pytest.raises(UnsupportedError, match="needs an NVIDIA GPU, the default device is a cpu"):
        coupled_scan(**make_inputs(Case(M=2, B=1, L=1, D=2, N=4)), implementation="mosaic_gpu")


def test_chosen_on_a_gpu_where_it_can_be(monkeypatch):
    problem = Problem(**make_inputs(Case(M=2, B=1, L=1, D=2, N=4)))
    monkeypatch.setattr(mosaic_gpu, "too_old_gpu", lambda *least: None)
    assert choose_implementation(problem, "gpu").name == "mosaic_gpu"
    monkeypatch.setattr(mosaic_gpu, "too_old_gpu", lambda *least: "it needs a Hopper GPU")
    choice = choose_implementation(problem, "gpu")
    assert choice.name == "xla" and "Hopper" in choice.reason
