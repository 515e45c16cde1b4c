"""Where the numbers of a run go: metrics.jsonl, TensorBoard and the progress bar."""

import json
import math
import os
import pathlib
import time
from collections.abc import Mapping
from typing import SupportsFloat

import tensorboardX
from tqdm import auto as tqdm
from tqdm.std import EMA

from cmamba_jax.errors import UserError

_KEYS = ("step", "epoch", "split")


def read_history(run_dir: str | os.PathLike) -> list[dict]:
    """Reads the records of a run's metrics.jsonl, oldest first.

    A last line that a killed process left incomplete is dropped. A value that was not finite comes back as NaN.

    Args:
        run_dir: folder of the run.

    Returns:
        Dicts with "step", "epoch", "split" and one entry a metric; empty when the run has written none.

    Raises:
        UserError: a line other than the last is not JSON.
    """
    path = pathlib.Path(run_dir) / "metrics.jsonl"
    if not path.exists():
        return []
    *lines, incomplete = path.read_text(encoding="utf-8").split("\n")
    del incomplete  # Empty unless the process was killed while it wrote.
    try:
        records = [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged ({error}): delete the broken line and resume") from error
    return [{key: math.nan if value is None else value for key, value in record.items()} for record in records]


class MetricWriter:
    """Appends metrics to RUN_DIR/metrics.jsonl and to TensorBoard files in RUN_DIR/tensorboard.

    metrics.jsonl holds one JSON object a line, `{"step": 40, "epoch": 2, "split": "valid", "loss": 0.31}`, and is
    flushed after every line. Its content is a function of the training alone: a resumed run leaves the same bytes as
    an uninterrupted one, provided that the records of a step are written before its checkpoint is saved.

    Args:
        run_dir: folder of the run; made when it does not exist.
        start_step: step of the checkpoint that the run continues from. Records of later steps are dropped first, from
            metrics.jsonl by an atomic rewrite. 0 starts afresh.
    """

    def __init__(self, run_dir: str | os.PathLike, *, start_step: int = 0):
        folder = pathlib.Path(run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        kept = [record for record in read_history(folder) if 0 < start_step >= record["step"]]
        path = folder / "metrics.jsonl"
        rewritten = path.with_suffix(".tmp")
        rewritten.write_text("".join(_to_line(record) for record in kept), encoding="utf-8")
        rewritten.replace(path)
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._tensorboard = tensorboardX.SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)

    def write(
        self,
        step: int,
        epoch: int,
        split: str,
        values: Mapping[str, SupportsFloat],
        *,
        timing: Mapping[str, SupportsFloat] | None = None,
    ) -> None:
        """Writes the metrics of one split at one step.

        Args:
            step: number of updates of the parameters so far.
            epoch: epoch that the step belongs to.
            split: "train", "valid" or "test".
            values: metrics by name: numbers, or arrays of one.
            timing: measurements that differ from run to run, such as samples per second: these go to TensorBoard only.

        Raises:
            ValueError: a metric is called "step", "epoch" or "split".
        """
        if taken := set(values) & set(_KEYS):
            raise ValueError(f"{sorted(taken)} cannot be the names of metrics: records use them as keys")
        record = {"step": int(step), "epoch": int(epoch), "split": split}
        numbers = {name: float(value) for name, value in values.items()}
        self._file.write(_to_line(record | numbers))
        for name, value in (numbers | dict(timing or {})).items():
            self._tensorboard.add_scalar(f"{split}/{name}", float(value), step)

    def close(self) -> None:
        """Flushes and closes both files."""
        self._file.close()
        self._tensorboard.close()


class Progress:
    """A progress bar over the steps of a run, with the loss, samples per second and the time left.

    Args:
        total_steps: steps of the whole run.
        start_step: step that the run starts at, not zero when it is resumed.
        enabled: False shows no bar; messages are printed all the same.
    """

    def __init__(self, total_steps: int, start_step: int = 0, enabled: bool = True):
        self._bar = tqdm.tqdm(
            total=total_steps, initial=start_step, disable=not enabled, unit="step", dynamic_ncols=True
        )
        self._step, self._time, self._pace = start_step, time.perf_counter(), EMA(0.1)

    def update(self, step: int, loss: float, samples: int) -> None:
        """Moves the bar to a step.

        Args:
            step: steps done so far.
            loss: the newest training loss.
            samples: samples seen since the last update.
        """
        now = time.perf_counter()
        seconds_per_sample = self._pace((now - self._time) / samples)
        self._bar.set_postfix_str(f"loss {loss:.4g}, {1 / seconds_per_sample:,.0f} samples/s", refresh=False)
        self._bar.update(step - self._step)
        self._step, self._time = step, now

    def message(self, text: str) -> None:
        """Prints a line without breaking the bar."""
        self._bar.write(text)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        self._bar.close()


class Silence:
    """Stands for a `MetricWriter` and a `Progress` in processes that leave both to another one."""

    def write(self, *args: object, **kwargs: object) -> None:
        """Writes nothing."""

    def update(self, *args: object) -> None:
        """Shows nothing."""

    def message(self, text: str) -> None:
        """Prints nothing."""

    def close(self) -> None:
        """Closes nothing."""


def _to_line(record: Mapping) -> str:
    # NaN and infinity are no JSON: null stands for both.
    finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in record.items()}
    return json.dumps(finite) + "\n"
