"""A trace of a few training steps by JAX's profiler."""

import pathlib

import jax

_WARM_UP = 5
"""Steps before the trace: the first compile."""


class Profiler:
    """Traces `steps` steps once a few have gone by; the trace opens in TensorBoard, XProf or Perfetto.

    Steps carry their numbers, and the parts of a step the names forward_backward and update.

    Args:
        folder: where the trace goes.
        steps: how many steps; 0: none.
    """

    def __init__(self, folder: pathlib.Path, steps: int):
        self._folder, self._steps, self._seen, self._running = folder, steps, 0, False

    def step(self, number: int) -> jax.profiler.StepTraceAnnotation:
        """Context of a training step."""
        if self._steps and self._seen == _WARM_UP:
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        if self._running and self._seen == _WARM_UP + self._steps:
            self.close()
        self._seen += 1
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def close(self) -> None:
        """Writes the trace if it is running."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
