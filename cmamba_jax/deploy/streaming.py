"""Live streams: one answer a step, with memory that does not grow."""

import dataclasses
import json
import os
import pathlib
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from cmamba_jax.config_json import to_dict
from cmamba_jax.deploy.alignment import Alignment, Step
from cmamba_jax.errors import UserError
from cmamba_jax.models import ModelState
from cmamba_jax.train.inference import Run

Values = npt.ArrayLike | None


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the model says after a step, for all S streams of a session.

    Attributes:
        time: of the last sample that the answer rests on.
        logits: float32 [S, K], of this step or of the sequence so far.
        outputs: probabilities of the classes or labels, or values of the targets, float32 [S, K].
        labels: one entry a stream, see `Prediction.labels`; empty for regression.
        missing: modalities without any sample in this step, in no stream.
    """

    time: int
    logits: np.ndarray
    outputs: np.ndarray
    labels: tuple
    missing: tuple[str, ...]


class StreamingSession:
    """Runs a trained model over S live streams that share one clock.

    L steps give what `Run.predict` gives for a sequence of L steps. A model with frames answers once a frame.
    What it keeps is the model's state, one frame and the samples of at most max_delay + 1 steps.

    Args:
        run: the trained model, from `load_run` or `load_pretrained`.
        streams: S, sequences that advance together.
        max_delay: for `feed`: steps that a late sample may lie behind the newest one.

    Raises:
        UserError: the model is bidirectional: it needs whole sequences.

    Example:
        >>> import numpy as np, tempfile
        >>> from cmamba_jax import ExperimentConfig, ModelConfig, TrainConfig, fit, from_arrays, load_run
        >>> from cmamba_jax.deploy import StreamingSession
        >>> rng = np.random.default_rng(0)
        >>> data = {"motion": rng.normal(size=(30, 6, 2)), "sound": rng.normal(size=(30, 6, 1))}
        >>> config = ExperimentConfig(
        ...     "live", model=ModelConfig(d_model=4, d_state=2, n_layers=1),
        ...     train=TrainConfig(epochs=1, output=tempfile.mkdtemp()),
        ... )
        >>> run = load_run(fit(config, from_arrays(data, rng.normal(size=30))).run_dir)  # doctest: +ELLIPSIS
        epoch 1/1 ...
        >>> session = StreamingSession(run, max_delay=2)
        >>> session.push({"motion": [0.1, 0.2], "sound": None}).missing
        ('sound',)
        >>> session.feed(1, {"motion": [0.3, 0.1]})  # The sound of this step is late:
        []
        >>> [answer.time for answer in session.feed(1, {"sound": [0.5]})]
        [1]
    """

    def __init__(self, run: Run, *, streams: int = 1, max_delay: int = 0):
        if run.config.model.direction == "bidirectional":
            raise UserError("a bidirectional model needs whole sequences: train one with model.direction 'causal'")
        if streams < 1 or max_delay < 0:
            raise UserError(f"streams={streams}, max_delay={max_delay}: expected at least 1 stream and a delay >= 0")
        self.run = run
        self.streams = streams
        self.alignment = Alignment(run.model.modalities, max_delay)
        self._step, self._params = run.stream_step, run.params
        size = run.config.model.frame
        self._inputs = {m: np.zeros((streams, size, f), np.float32) for m, f in run.model.features}
        self._mask = {m: np.zeros((streams, size), bool) for m in self._inputs}
        self._offset = {m: run.normalizer.offset[m] for m in self._inputs}
        self._scale = {m: run.normalizer.scale[m] for m in self._inputs}
        self.restart()

    def restart(self) -> None:
        """Starts new sequences and a new clock; what was not answered yet is forgotten."""
        self.alignment.restart()
        self._state: ModelState = self.run.model.init_state(self.streams)
        self._filled = 0
        self._clear_frame()

    def push(self, inputs: Mapping[str, Values], *, mask: Mapping[str, npt.ArrayLike] | None = None) -> Answer | None:
        """Takes the next step, with everything that there is of it.

        Args:
            inputs: modality -> raw values [F] (one stream) or [S, F]. A modality that is absent or None is missing.
            mask: modality -> bool [S], False where its sample is missing in one stream; None: all there.

        Returns:
            The answer, or None within a frame.

        Raises:
            UserError: the values do not fit the model, or steps given to `feed` still wait.
        """
        if self.alignment.waiting:
            raise UserError("push: steps given to feed still wait for samples; use feed only, or call finish first")
        step = {name: self._checked(name, values) for name, values in inputs.items()}
        masks = {name: self._checked_mask(name, values) for name, values in (mask or {}).items()}
        time = self.alignment.next or 0
        self.alignment.next = time + 1
        return self._advance(time, step, masks)

    def feed(self, time: int, inputs: Mapping[str, Values]) -> list[Answer]:
        """Takes samples as they come, modality by modality; see `Alignment` for when a step is closed.

        Args:
            time: step that the samples belong to; the first one sets the clock.
            inputs: modality -> raw values [F] or [S, F]; None: this sample will not come.

        Returns:
            The answers of all steps that can be closed now. Samples of closed steps are left out and counted in
            `late`.

        Raises:
            UserError: the values do not fit the model, or the time is far ahead. The session stays as it was.
        """
        step = {name: self._checked(name, values) for name, values in inputs.items()}
        return self._answers(self.alignment.add(time, step))

    def finish(self) -> list[Answer]:
        """Closes the steps that wait and an incomplete frame, as the end of a sequence does."""
        answers = self._answers(self.alignment.flush())
        if self._filled:
            answers.append(self._answer((self.alignment.next or 1) - 1))
        return answers

    @property
    def late(self) -> dict[str, int]:
        """Per modality, how many samples came too late and were left out."""
        return dict(self.alignment.late)

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept between two steps, without the samples that wait."""
        return sum(x.nbytes for x in jax.tree.leaves((self._state, self._inputs, self._mask)))

    def save(self, path: str | os.PathLike) -> None:
        """Writes everything that the stream needs to go on later, in one .npz file, replaced as a whole."""
        path = pathlib.Path(path)
        arrays = {f"state{i}": np.asarray(x, np.float32) for i, x in enumerate(jax.tree.leaves(self._state))}
        arrays |= {f"inputs.{name}": values for name, values in self._inputs.items()}
        arrays |= {f"mask.{name}": values for name, values in self._mask.items()}
        waiting: dict[str, dict[str, bool]] = {}
        for time, step in self.alignment.waiting.items():
            waiting[str(time)] = {name: values is not None for name, values in step.items()}
            arrays |= {f"waiting.{time}.{name}": values for name, values in step.items() if values is not None}
        position = {
            "model": self._fingerprint(),
            "streams": self.streams,
            "filled": self._filled,
            "next": self.alignment.next,
            "waiting": waiting,
            "late": self.late,
        }
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("wb") as file:
            np.savez(file, position=np.array(json.dumps(position)), **arrays)  # pyrefly: ignore
        temporary.replace(path)

    def load(self, path: str | os.PathLike) -> None:
        """Goes on where `save` left off; the answers are those of an uninterrupted stream.

        Raises:
            UserError: the file cannot be read, or belongs to another model or number of streams.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
            position: dict[str, Any] = json.loads(str(arrays.pop("position")))
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} holds no state of a stream ({error}); delete it to start afresh") from error
        expected = {"model": self._fingerprint(), "streams": self.streams}
        if different := [name for name, value in expected.items() if position.get(name) != value]:
            raise UserError(
                f"{path} belongs to another {different[0]} ({position.get(different[0])}, expected "
                f"{expected[different[0]]}); use the model that wrote it, or delete it to start afresh"
            )
        leaves, structure = jax.tree.flatten(self._state)
        loaded = [np.asarray(arrays[f"state{i}"]).astype(like.dtype) for i, like in enumerate(leaves)]
        self._state = jax.tree.unflatten(structure, map(jax.numpy.asarray, loaded))
        self._inputs = {name: arrays[f"inputs.{name}"] for name in self._inputs}
        self._mask = {name: arrays[f"mask.{name}"] for name in self._mask}
        self._filled = position["filled"]
        self.alignment.next = position["next"]
        self.alignment.late.clear()
        self.alignment.late.update(position["late"])
        self.alignment.waiting = {
            int(time): {name: arrays[f"waiting.{time}.{name}"] if there else None for name, there in step.items()}
            for time, step in position["waiting"].items()
        }

    def _answers(self, steps: list[tuple[int, Step]]) -> list[Answer]:
        answers = (self._advance(time, step, {}) for time, step in steps)
        return [answer for answer in answers if answer is not None]

    def _advance(self, time: int, step: Step, masks: Mapping[str, np.ndarray]) -> Answer | None:
        """Adds a step to the frame, and runs the model where that completes it."""
        for name, values in step.items():
            if values is not None:
                self._inputs[name][:, self._filled] = (values - self._offset[name]) / self._scale[name]
                self._mask[name][:, self._filled] = masks.get(name, True)
        self._filled += 1
        full = self._filled == self.run.config.model.frame
        return self._answer(time) if full else None

    def _answer(self, time: int) -> Answer:
        inputs, mask = self._inputs, self._mask
        if self.run.config.model.frame == 1:
            inputs, mask = ({name: values[:, 0] for name, values in part.items()} for part in (inputs, mask))
        logits, self._state = self._step(self._params, self._state, inputs, mask)
        logits = np.asarray(logits, np.float32)  # Waits for the result, so the frame may be written again.
        missing = tuple(name for name, values in self._mask.items() if not values.any())
        self._filled = 0
        self._clear_frame()
        return Answer(time, logits, *self.run.interpret(logits), missing)

    def _clear_frame(self) -> None:
        for name in self._inputs:
            self._inputs[name].fill(0)
            self._mask[name].fill(False)

    def _checked(self, name: str, values: Values) -> np.ndarray | None:
        if name not in self._inputs:
            raise UserError(f"unknown modality {name!r}; expected {', '.join(self._inputs)}")
        if values is None:
            return None
        width = self._inputs[name].shape[-1]
        try:
            array = np.asarray(values, np.float32)
        except (TypeError, ValueError):
            raise UserError(f"modality {name!r}: expected {width} numbers, got {values!r:.80}") from None
        if self.streams == 1 and array.ndim < 2:
            array = array.reshape(1, -1)
        if array.shape != (self.streams, width):
            expected = f"{width} numbers" if self.streams == 1 else f"[{self.streams}, {width}]"
            raise UserError(f"modality {name!r}: expected {expected}, got shape {list(np.shape(values))}")
        if not np.isfinite(array).all():
            raise UserError(f"modality {name!r}: expected finite numbers, got {values!r:.80}; leave a missing one out")
        return array

    def _checked_mask(self, name: str, values: npt.ArrayLike) -> np.ndarray:
        mask = np.asarray(values)
        if name not in self._inputs or mask.shape != (self.streams,) or mask.dtype != bool:
            raise UserError(
                f"mask of {name!r}: expected bool [{self.streams}] of one of {', '.join(self._inputs)}, "
                f"got {mask.dtype} {list(mask.shape)}"
            )
        return mask

    def _fingerprint(self) -> str:
        """Changes with the architecture and with every parameter."""
        crc = zlib.crc32(json.dumps([to_dict(self.run.config.model), self.run.normalizer.to_dict()]).encode())
        for leaf in jax.tree.leaves(self._params):
            crc = zlib.crc32(np.asarray(leaf).tobytes(), crc)
        return f"{crc:08x}"
