"""The coupled selective scan.

api.py        the public functions; check the arguments and pick an implementation
types.py      couplings, the problem handed to an implementation, the result
reference.py  one step at a time, as the equations read
xla.py        in time chunks, for every backend: associative scans, on CPUs step by step
steps.py      those steps, with their derivative written out
discretize.py what surrounds the recurrence in them
mosaic_gpu/   Pallas kernels for NVIDIA GPUs
mosaic_tpu/   Pallas kernels for TPUs
triton_gpu/   Triton kernels for NVIDIA GPUs, through jax-triton
sequence_parallel.py  time cut over devices, inside shard_map
sharded.py    the scan of arrays that are spread over a mesh of devices
varying.py    over which axes of a mesh values vary
cases.py      shapes and inputs shared by tests and benchmarks
"""

from pallas_kernels.coupled_scan.api import (
    Choice,
    Implementation,
    choose_implementation,
    coupled_scan,
    coupled_scan_step,
    implementations,
)
from pallas_kernels.coupled_scan.types import (
    Coupling,
    Full,
    Independent,
    ScanInputError,
    ScanOutput,
    Shared,
    UnsupportedError,
)

__all__ = [
    "Choice",
    "Coupling",
    "Full",
    "Implementation",
    "Independent",
    "ScanInputError",
    "ScanOutput",
    "Shared",
    "UnsupportedError",
    "choose_implementation",
    "coupled_scan",
    "coupled_scan_step",
    "implementations",
]
