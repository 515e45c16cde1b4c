"""The coupled scan as Pallas kernels for NVIDIA GPUs of the Hopper generation and newer."""

from typing import Any

from pallas_kernels.coupled_scan.types import Problem, ScanOutput


def scan(problem: Problem, *, interpret: Any = None) -> ScanOutput:
    """Solves the problem on a GPU."""
    from pallas_kernels.coupled_scan.mosaic_gpu import vjp

    return vjp.scan(interpret, problem)
