"""What the benchmarks on accelerators time alike."""

import contextlib
import fcntl
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator


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


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Keeps several benchmarks that run at once from timing at once."""
    with open(pathlib.Path(tempfile.gettempdir()) / "cmamba-bench.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
