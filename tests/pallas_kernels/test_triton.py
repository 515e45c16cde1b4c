"""The Triton kernels in Triton's interpreter, which runs them step by step in numpy, against the float64 oracle.

What Triton's compiler makes of them: test_triton_aot.py; on a GPU: test_mosaic_gpu_device.py.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import os
from unittest import mock

import jax
import numpy as np
import pytest
import test_coupled_scan as suite

from pallas_kernels import UnsupportedError, _compat, choose_implementation, coupled_scan
from pallas_kernels.coupled_scan import api, triton_gpu
from pallas_kernels.coupled_scan.cases import Case, make_inputs
from pallas_kernels.coupled_scan.types import Problem

HAS_TRITON = all(importlib.util.find_spec(name) for name in ("triton", "jax_triton"))
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton: pip install 'cmamba-jax[triton]'")
if HAS_TRITON:
    # Triton decides on its first import whether functions are compiled or interpreted.
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        import triton.experimental.gluon  # noqa: F401  (Triton itself imports it later, with the switch off)

        from pallas_kernels.coupled_scan.triton_gpu import kernels  # noqa: F401

EVERYTHING = suite.EVERYTHING


class Tensor:
    """As much of a PyTorch tensor as Triton's interpreter asks for: numpy's memory, on the host already."""

    def __init__(self, values):
        self.values, self.dtype = values, values.dtype.name

    def data_ptr(self):
        return self.values.ctypes.data

    def untyped_storage(self):
        return self

    def cpu(self):
        return self

    def new_empty(self, size, device):
        del size, device
        return Tensor(self.values)

    def set_(self, *storage):
        del storage

    def storage_offset(self):
        return 0

    def size(self):
        return self.values.shape

    def stride(self):
        return self.values.strides

    def copy_(self, other):
        assert other.values is self.values


def interpret(kernel, arrays, outputs, *, grid, warps, constants):
    """Like `vjp.call_on_gpu`, on the host. What a kernel does not write stays NaN."""
    del warps

    def host(*arrays):
        inputs = [Tensor(np.ascontiguousarray(v)) for v in arrays]
        results = [Tensor(np.full(v.shape, np.nan, v.dtype)) for v in outputs.values()]
        with np.errstate(all="ignore"):
            kernel[grid](*inputs, *results, **constants)
        return tuple(tensor.values for tensor in results)

    return dict(zip(outputs, jax.pure_callback(host, tuple(outputs.values()), *arrays), strict=True))


def run(**arguments):
    """`coupled_scan` by the interpreted kernels."""
    entry = dataclasses.replace(
        api.implementations()["triton"],
        run=functools.partial(triton_gpu.scan, call=interpret),
        unsupported=lambda problem, platform: triton_gpu.limits(problem),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "_IMPLEMENTATIONS", (entry,))
        return coupled_scan(**arguments, implementation="triton")


def scan_and_vjp(inputs, *bars, **options):
    return suite._scan_and_vjp(run, suite._static(options), *suite._split(inputs), *bars)


CASES = [
    *(Case(M=3, B=2, L=19, D=5, N=4, coupling=c, **EVERYTHING) for c in suite.COUPLINGS),
    *(
        Case(M=2, B=1, L=17, D=70, N=5, dtype="bfloat16", coupling=c, readout="shared", reverse=True, **EVERYTHING)
        for c in suite.COUPLINGS
    ),
    *(Case(M=2, B=2, L=3, D=3, N=16, coupling=c, dt_softplus=False) for c in suite.COUPLINGS),
    Case(M=1, B=1, L=1, D=1, N=4, coupling="full", gate=True),
    Case(M=8, B=1, L=5, D=9, N=128, coupling="full", gate=True, mask=True),
    Case(M=5, B=1, L=18, D=33, N=64, coupling="shared", dt_bias=True, reset=True),
    Case(M=3, B=1, L=35, D=4, N=16, coupling="independent", readout="shared", skip=True, mask=True, reverse=True),
    Case(M=3, B=1, L=32, D=4, N=16, dtype="bfloat16", coupling="shared", skip=True, gate=True, initial_state=True),
]


@needs_triton
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_every_gradient(case):
    suite.test_forward_and_every_gradient(scan_and_vjp, case)


@needs_triton
@pytest.mark.parametrize("coupling", suite.COUPLINGS)
def test_garbage_in_masked_places_leaks_nowhere(coupling, monkeypatch):
    monkeypatch.setattr(suite, "SMALL", dataclasses.replace(suite.SMALL, L=6))
    suite.test_garbage_in_masked_places_leaks_nowhere(scan_and_vjp, coupling, np.nan, "float32")


@needs_triton
@pytest.mark.parametrize("coupling", suite.COUPLINGS)
def test_state_passes_untouched_where_every_modality_is_masked(coupling, monkeypatch):
    monkeypatch.setattr(suite, "SMALL", dataclasses.replace(suite.SMALL, L=6))
    suite.test_state_passes_untouched_where_every_modality_is_masked(scan_and_vjp, coupling)


def problem(**changes):
    return Problem(**make_inputs(Case(**{"M": 2, "B": 1, "L": 1, "D": 2, "N": 4} | changes)))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"M": 9}, "up to 8 modalities and 128 states, got M=9"), ({"N": 136}, "got M=2, N=136")],
)
def test_says_what_it_cannot_do(changes, reason):
    assert reason in triton_gpu.limits(problem(**changes))


def test_forced_without_a_gpu_it_says_so():
    with pytest.raises(UnsupportedError, match="'triton' cannot be used here: it needs an NVIDIA GPU.* is a cpu"):
        coupled_scan(**make_inputs(Case(M=2, B=1, L=1, D=2, N=4)), implementation="triton")


def test_without_its_packages_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "needs triton and jax_triton, which pip install 'cmamba-jax[triton]'" in triton_gpu.unsupported(
        problem(), "gpu"
    )


@pytest.mark.parametrize(("capability", "usable"), [("7.5", False), ("8.0", True), ("9.0", True), ("12.0", True)])
def test_wants_ampere_and_is_never_chosen_by_itself(capability, usable, monkeypatch):
    device = mock.Mock(compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda *platform: [device])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(_compat, "triton_refusal", lambda: None)
    why = triton_gpu.unsupported(problem(), "gpu")
    assert why is None if usable else "compute capability 8.0) or newer, this has 7.5" in why
    assert choose_implementation(problem(), "gpu").name != "triton"


@pytest.mark.parametrize(
    ("triton", "version", "works"),
    [("0.3.1", (0, 10, 2), True), ("0.4.1", (0, 12, 0), False), ("0.5.0", (0, 12, 0), True)],
)
def test_versions_that_do_not_work_together(triton, version, works, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: triton)
    monkeypatch.setattr(jax, "__version_info__", version)
    assert (_compat.triton_refusal() is None) == works
