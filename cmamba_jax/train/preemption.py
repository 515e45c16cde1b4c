"""Being told to stop: SIGTERM, which clusters send before they take a machine away."""

import signal
import threading
from types import FrameType

import jax

EXIT_CODE = 75
"""Exit code of a run that was told to stop and saved its state (sysexits.h: "temporary failure, try again")."""


class Preempted(Exception):
    """Training stopped after SIGTERM; its state is saved."""


class Preemption:
    """While entered, SIGTERM does not end the process but makes `requested` true.

    With several processes JAX's own service agrees on one step, so that all save the same.
    """

    def __init__(self) -> None:
        self._told = False
        self._old = None

    def __enter__(self) -> "Preemption":
        # Only the main thread may set handlers; a notebook or a server may run training in another.
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            self._old = signal.signal(signal.SIGTERM, self._tell)
        return self

    def __exit__(self, *_: object) -> None:
        if self._old is not None:
            signal.signal(signal.SIGTERM, self._old)

    def _tell(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._told = True

    def requested(self, step: int) -> bool:
        """Whether to save and stop after this step; to be called after every step, by all processes."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            return multihost_utils.reached_preemption_sync_point(step)
        return self._told
