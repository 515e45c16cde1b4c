"""Being told to stop: SIGTERM, which clusters send before they take a machine away."""

import signal
import threading
from types import FrameType

import jax
import numpy as np

AGREE_EVERY = 5
"""Steps between two questions of several processes to each other whether one was told to stop."""
EXIT_CODE = 75
"""Exit code of a run that was told to stop and saved its state (sysexits.h: "temporary failure, try again")."""


class Preempted(Exception):
    """Training stopped after SIGTERM; its state is saved."""


class Preemption:
    """While entered, SIGTERM does not end the process but makes `requested` true.

    With several processes all agree on one step, so that all save the same. JAX's own service for that is asked by
    Orbax too, with steps of its own: two processes were seen to stop at different steps and wait for each other.
    """

    def __init__(self) -> None:
        self._told = False
        self._old = None

    def __enter__(self) -> "Preemption":
        # Only the main thread may set handlers; a notebook or a server may run training in another.
        if threading.current_thread() is threading.main_thread():
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
        if jax.process_count() == 1:
            return self._told
        if step % AGREE_EVERY:
            return False
        from jax.experimental import multihost_utils

        return bool(np.any(multihost_utils.process_allgather(np.array(self._told))))
