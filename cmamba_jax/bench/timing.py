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

RUN_SECONDS = 0.1


def median_seconds(run: Callable[[int], None], *, calls: int | None = None, repeats: int) -> float:
    """Seconds of one call: the median over `repeats` timed runs, after one call that is not timed.

    Args:
        run: makes that many calls, issued back to back (the host's work hides behind the device's), and waits for the
            last one.
        calls: of a timed run; None: as many as take about RUN_SECONDS, so that the host's part before the first and
            after the last one, a fraction of a millisecond, is little of it.
        repeats: timed runs.
    """
    with _alone():
        run(1)
        if calls is None:
            start = time.perf_counter()
            run(1)
            calls = max(1, round(RUN_SECONDS / (time.perf_counter() - start)))
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
