"""Memory of the host between two training steps."""

import ctypes
import os

from pallas_kernels.platform import default_platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Names of glibc's `mallopt`, from its malloc.h."""

_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """On CPUs, has the C library keep what programs free for the next one instead of returning it to the system.

    XLA allocates a program's temporary memory anew for every call. By default glibc maps such blocks for each call and
    unmaps them afterwards, and the system clears every page again when it is first touched: on two cores a training
    step of configs/watch.py took 64 ms, without that 41. The process keeps its largest size until it ends, except for
    blocks of 1 GiB and more. Does nothing where an environment variable already sets glibc's memory up, or where the C
    library is another one.

    Returns:
        Whether the C library was told so.
    """
    if default_platform() != "cpu" or any(name in os.environ for name in _VARIABLES):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_MMAP_THRESHOLD, 2**30) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))
