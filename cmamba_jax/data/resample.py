"""Modalities of different rates on one clock: resampling to a common number of steps."""

import math
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from cmamba_jax.errors import UserError

Method = Literal["mean", "nearest", "frames"]


def resample(
    values: Float[np.ndarray, "L F"],
    length: int,
    method: Method,
    *,
    n_real: int | None = None,
    slots: int | None = None,
) -> tuple[Float[np.ndarray, "T E"], Bool[np.ndarray, "T"]]:
    """Brings L steps to T = `length` steps.

    The steps are divided into T windows that start at floor(l L / T), as the published code of Coupled Mamba does;
    where L < T a step stands in several windows.

    - "mean": the mean of each window (the published code).
    - "nearest": the step at the middle of each window.
    - "frames": all steps of each window side by side, E = slots * F. A linear encoder over them is a learned
      convolution of stride `slots` and as many taps, and a convolutional encoder of k taps one of k * slots taps
      (`model.encoder`, `model.encoder_width`). A window that is shorter than `slots` repeats its last step.

    Args:
        values: float [L, F]; what lies behind the real steps is not read.
        length: T, at least 1.
        method: what a window becomes.
        n_real: steps that are no padding, 0 to L; None: all. The published code averages the zeros of the padding
            too; here a window that is real in part has the mean of that part.
        slots: for "frames", steps that a window has room for; None: those of the largest window.

    Returns:
        float32 [T, F] or [T, slots * F], zero where the window is padding, and the mask [T]: False there.

    Raises:
        UserError: the sizes are impossible.

    Example:
        >>> values = np.arange(5.0)[:, None]
        >>> resample(values, 2, "mean")[0].ravel(), resample(values, 2, "nearest")[0].ravel()
        (array([0.5, 3. ], dtype=float32), array([1., 3.], dtype=float32))
        >>> resample(values, 2, "frames")[0]
        array([[0., 1., 1.],
               [2., 3., 4.]], dtype=float32)
    """
    n_steps = len(values)
    n_real = n_steps if n_real is None else n_real
    if not n_steps or length < 1 or not 0 <= n_real <= n_steps:
        raise UserError(
            f"resampling {n_steps} steps, {n_real} of them real, to {length}: expected at least one step on both sides "
            "and no more real steps than there are"
        )
    # As the published code computes it: where l L / T is a whole number, rounding can make it one less.
    starts = np.linspace(0, n_steps, length + 1)[:-1].astype(int)
    stops = np.maximum(np.append(starts[1:], n_steps), starts + 1)
    real = np.clip(np.minimum(stops, n_real) - starts, 0, None)  # Real steps of each window.
    if method == "nearest":
        middle = (2 * np.arange(length) + 1) * n_steps // (2 * length)
        out, mask = values[middle], middle < n_real
    elif method == "mean":
        padded = np.where((np.arange(n_steps) < n_real)[:, None], values, 0)
        # Where a start repeats, reduceat takes that single step.
        out = np.add.reduceat(padded, starts, axis=0, dtype=np.float64) / np.maximum(real, 1)[:, None]
        mask = real > 0
    else:
        needed = int((stops - starts).max())
        slots = needed if slots is None else slots
        if slots < needed:
            raise UserError(f"resampling {n_steps} steps to {length} needs {needed} slots a window, got {slots}")
        inside = np.minimum(np.arange(slots), np.maximum(real, 1)[:, None] - 1)
        out, mask = values[starts[:, None] + inside].reshape(length, -1), real > 0
    return np.where(mask[:, None], out, 0).astype(np.float32), mask


def frame_slots(n_steps: int, length: int) -> int:
    """Steps of the largest window when at most `n_steps` become `length`."""
    return math.ceil(n_steps / length)
