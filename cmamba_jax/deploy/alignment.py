"""Brings samples that arrive modality by modality, late or never, onto the one clock of a model."""

import dataclasses
from collections import Counter
from collections.abc import Mapping

import numpy as np

from cmamba_jax.errors import UserError

MAX_GAP = 10_000
"""Steps that may be absent between two samples: each of them is computed, as a step at which nothing was observed."""

Step = dict[str, np.ndarray | None]


@dataclasses.dataclass
class Alignment:
    """Collects the samples of each step until the step is complete, or too old to wait for.

    The clock starts at the time of the first sample. A step is closed as soon as all earlier steps are closed and all
    its modalities have come; at the latest when a sample more than `max_delay` steps newer arrives: what is absent
    then is missing. At most max_delay + 1 steps wait.

    Attributes:
        modalities: the names that make a step complete.
        max_delay: steps that a late sample may lie behind the newest one.
        next: time of the next step to close; None before the first sample.
        waiting: per time, the samples of a step that is not closed; None: known to be missing.
        late: per modality, how many samples came after their step was closed and were left out.
    """

    modalities: tuple[str, ...]
    max_delay: int
    next: int | None = None
    waiting: dict[int, Step] = dataclasses.field(default_factory=dict)
    late: Counter = dataclasses.field(default_factory=Counter)

    def add(self, time: int, samples: Mapping[str, np.ndarray | None]) -> list[tuple[int, Step]]:
        """Adds samples of one step and returns time and samples of every step that this closes, in order.

        Raises:
            UserError: the time is more than `MAX_GAP` steps ahead.
        """
        if self.next is None:
            self.next = time
        if time < self.next:
            self.late.update(samples.keys())
            return []
        if time - self.next > MAX_GAP:
            raise UserError(
                f"time {time} is {time - self.next} steps ahead (expected at most {MAX_GAP}); count time in steps, or "
                "restart the stream where a new sequence begins"
            )
        self.waiting.setdefault(time, {}).update(samples)
        return self._close(max(self.waiting) - self.max_delay)

    def flush(self) -> list[tuple[int, Step]]:
        """Closes all steps that wait."""
        return self._close(max(self.waiting, default=0) + 1)

    def restart(self) -> None:
        """Forgets the clock and what waits; the next sample starts a new one."""
        self.next = None
        self.waiting.clear()

    def _close(self, before: int) -> list[tuple[int, Step]]:
        """Closes the steps before a time, and complete ones from there on."""
        closed = []
        while self.waiting and self.next is not None:
            step = self.waiting.get(self.next, {})
            if self.next >= before and len(step) < len(self.modalities):
                break
            self.waiting.pop(self.next, None)
            closed.append((self.next, step))
            self.next += 1
        return closed
