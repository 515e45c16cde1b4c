"""What the benchmarks on accelerators time alike."""

import contextlib
import fcntl
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp


def median_seconds(run: Callable[[int], None], *, calls: int, repeats: int) -> float:
    """Seconds of one call: the median over `repeats` timed runs, after one call that is not timed.

    Args:
        run: makes that many calls, issued back to back (the host's work hides behind the device's), and waits for the
            last one.
        calls: of a timed run.
        repeats: timed runs.
    """
    with _alone():
        run(1)
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            run(calls)
            times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def copy_bandwidth(floats: int = 2**28) -> float:
    """Bytes read plus written a second by a copy of that many float32 on the default device."""
    values = jnp.zeros(floats, jnp.float32)
    copy = jax.jit(lambda v: v + 1)

    def run(calls: int) -> None:
        for _ in range(calls):
            out = copy(values)
        jax.block_until_ready(out)

    return 2 * values.nbytes / median_seconds(run, calls=10, repeats=5)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Keeps several benchmarks that run at once from timing at once."""
    with open(pathlib.Path(tempfile.gettempdir()) / "cmamba-bench.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
