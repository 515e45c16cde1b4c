"""The coupled scan as two Triton kernels, called through jax-triton: for GPUs before Hopper, and as a cross-check.

Never run on a GPU yet, and never chosen by itself. Results are tested in Triton's interpreter on a CPU; Triton's
compiler builds the kernels for compute capability 8.0 and 9.0 without a GPU.

kernels.py  the forward and the backward kernel
vjp.py      problem -> arrays of the kernels -> results; the derivative rule

Axes: M modality, B batch, L time, D channel, N state; S chains (1 for `shared`: H = SUM_m h^m, else M).

A program has one sample and a block of channels. It walks time step by step with the states [S, N, D block] in
registers as float32, M and N filled up to powers of two. The forward kernel saves the state entering every SEGMENT
steps; the backward kernel takes the segments from the last to the first, writes the state entering each step of one
to device memory, and reads it again while it steps backwards. dB and dC leave as one partial sum a block of channels,
the parameters' gradients as one a sample; all are added up outside, in a fixed order, without atomic operations.
"""

import importlib.util
from typing import Any

import jax

from pallas_kernels.coupled_scan.types import Problem, ScanOutput
from pallas_kernels.coupled_scan.varying import varying_axes
from pallas_kernels.platform import too_old_gpu

__all__ = ["limits", "scan", "unsupported"]
MAX_MODALITIES, MAX_STATES = 8, 128


def scan(problem: Problem, *, call: Any = None) -> ScanOutput:
    """Solves the problem on a GPU.

    Args:
        problem: the checked arguments.
        call: runs a kernel, see `vjp.call_on_gpu`, which is the default; tests give one that interprets it.

    Returns:
        y and the final state.
    """
    # Triton is an optional dependency, and importing it takes time.
    from pallas_kernels.coupled_scan.triton_gpu import vjp

    return vjp.scan(call or vjp.call_on_gpu, problem)


def unsupported(problem: Problem, platform: str) -> str | None:
    """Why the kernels cannot solve a problem, or None if they can."""
    if platform != "gpu":
        return f"it needs an NVIDIA GPU, the default device is a {platform}"
    if missing := [name for name in ("triton", "jax_triton") if importlib.util.find_spec(name) is None]:
        return f"it needs {' and '.join(missing)}, which pip install 'cmamba-jax[triton]' brings"
    from pallas_kernels import _compat  # Imports Pallas, which takes a while.

    if why := too_old_gpu(8.0, "Ampere") or _compat.triton_refusal():
        return why
    if axes := varying_axes([leaf for leaf in jax.tree.leaves(problem) if isinstance(leaf, jax.Array)]):
        return f"inside jax.shard_map over {', '.join(sorted(axes))} it needs check_vma=False"
    return limits(problem)


def limits(problem: Problem) -> str | None:
    """Why the kernels cannot solve a problem on any GPU, or None if they can."""
    m, n = problem.x.shape[0], problem.A.shape[-1]
    if m > MAX_MODALITIES or n > MAX_STATES:
        return f"it takes up to {MAX_MODALITIES} modalities and {MAX_STATES} states, got M={m}, N={n}"
    return None
