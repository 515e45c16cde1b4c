"""A trained model from its run folder: scores and predictions."""

import csv
import dataclasses
import functools
import io
import json
import os
import pathlib
import zipfile
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from flax import nnx
from scipy import special

from cmamba_jax import metrics
from cmamba_jax.batch import Batch
from cmamba_jax.config import ExperimentConfig, MissingConfig, PipelineConfig
from cmamba_jax.data import DataError, DataInfo, Normalizer, Pipeline, Sample, Splits
from cmamba_jax.data.checks import checked
from cmamba_jax.errors import UserError
from cmamba_jax.models import CoupledMamba
from cmamba_jax.train import checkpoint, runs, state
from cmamba_jax.train.evaluation import Evaluation, Evaluator
from cmamba_jax.train.experiment import load_splits
from cmamba_jax.train.objective import make_loss_sum

_MASK = "_mask"


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What the model says about one sequence.

    Attributes:
        id: name of the sequence.
        outputs: probabilities of the classes or labels, or values of the targets: float32 [K], or [L, K] per step.
        labels: name of the most probable class (of each step); names of the labels with a probability above their
            threshold for multilabel; empty for regression.
    """

    id: str
    outputs: np.ndarray
    labels: tuple


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained model and all that belongs to it.

    Attributes:
        run_dir: its folder.
        config: the resolved configuration.
        info: modalities, task and label names.
        normalizer: feature scaling, as fitted on the training samples.
        model: the model with the parameters of the checkpoint; expects normalised inputs.
        epoch: epoch of the checkpoint.
        metrics: of an exported model, per split; those of a run are in its report.
    """

    run_dir: pathlib.Path
    config: ExperimentConfig
    info: DataInfo
    normalizer: Normalizer
    model: nnx.Module
    epoch: int
    metrics: dict[str, dict[str, float | None]] | None = None

    def evaluate(
        self,
        split: str = "test",
        splits: Splits | None = None,
        *,
        missing: MissingConfig = MissingConfig(),  # noqa: B008 (frozen)
    ) -> Evaluation:
        """Scores a split: metrics, and the outputs and labels of all predictions that count.

        Args:
            split: "train", "valid" or "test".
            splits: the data set; None: the one of the configuration.
            missing: what to remove from the samples.
        """
        if split not in ("train", "valid", "test"):
            raise UserError(f"unknown split {split!r}; expected train, valid or test")
        splits = load_splits(self.config) if splits is None else splits
        loss_sum = make_loss_sum(self.info.task, self.config.train)
        evaluator = Evaluator(self._predict, loss_sum, self.info.task, self.config.evaluation)
        return evaluator(self.params, self._pipeline(splits, self.config.pipeline).batches(split, missing))

    def predict(
        self,
        inputs: str | os.PathLike | Mapping[str, npt.ArrayLike | Sequence[npt.ArrayLike]],
        *,
        masks: Mapping[str, npt.ArrayLike | Sequence[npt.ArrayLike]] | None = None,
    ) -> list[Prediction]:
        """Predicts sequences without labels.

        Args:
            inputs: an .npz file or a folder of them, one sequence a file: an array [L, F] for each modality, and
                optionally bool ``NAME_mask`` [L]; other arrays, such as the label, are not read. Or arrays in memory:
                for each modality [N, L, F], or N arrays [L_i, F].
            masks: with arrays in memory, for each modality bool [N, L] or N arrays [L_i], False where it is missing.

        Returns:
            One prediction a sequence, in the order of the arrays or of the file names.

        Raises:
            UserError: there is no such file, or it cannot be read.
            DataError: a sequence does not fit the model.
        """
        if isinstance(inputs, str | os.PathLike):
            samples = self._read(pathlib.Path(inputs))
        else:
            samples = self._from_memory(inputs, masks or {})
        lengths = [len(next(iter(sample["inputs"].values()))) for sample in samples]
        # The pipeline wants three splits; one sample stands in for those that are not read. The buckets were
        # chosen for the training data: new sequences may be longer.
        config = dataclasses.replace(self.config.pipeline, buckets=())
        batches = self._pipeline(Splits(self.info, samples[:1], samples[:1], samples), config).batches("test")
        logits = []
        for batch in batches:
            outputs = np.asarray(self._predict(self.params, batch), np.float32)
            logits += list(outputs[np.asarray(batch.weight) > 0])
        per_step = self.info.task.per == "step"
        return [
            Prediction(sample["id"], *self.interpret(values[:length] if per_step else values))
            for sample, values, length in zip(samples, logits, lengths, strict=True)
        ]

    def interpret(self, logits: np.ndarray) -> tuple[np.ndarray, tuple]:
        """What logits [..., K] of the model mean: the ``outputs`` and ``labels`` of `Prediction`."""
        return interpret(self.info, logits, self.config.evaluation.thresholds)

    def batch(self, inputs: Mapping[str, npt.ArrayLike], masks: Mapping[str, npt.ArrayLike] | None = None) -> Batch:
        """One sequence [L, F] (and masks bool [L]) of each modality, checked and normalised, as a batch of one."""
        given = {name: [values] for name, values in inputs.items()}
        (sample,) = self._from_memory(given, {name: [values] for name, values in (masks or {}).items()})
        sample = self.normalizer(checked(sample, self.info))
        inputs, masks = ({name: sample[part][name][None] for name in self.info.features} for part in ("inputs", "mask"))
        return Batch(inputs=inputs, mask=masks)

    def sample(self, where: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Inputs and masks of one sequence.

        Args:
            where: an .npz file, see `predict`; or SPLIT:NUMBER for a sample of the configured data, such as "test:0".

        Raises:
            UserError: there is no such file or sample.
        """
        split, _, number = where.partition(":")
        if split in ("train", "valid", "test") and number.isdecimal():
            samples = getattr(load_splits(self.config), split)
            if int(number) >= len(samples):
                raise UserError(f"{where}: the {split} split has {len(samples)} samples, 0 to {len(samples) - 1}")
            sample = samples[int(number)]
        else:
            (sample,) = self._read(pathlib.Path(where))
        return sample["inputs"], sample.get("mask") or {}

    @functools.cached_property
    def _predict(self):
        return state.make_predict_step(state.split_model(self.model)[0])

    @functools.cached_property
    def stream_step(self):
        """``step(params, state, inputs, mask)`` of `state.make_stream_step`, compiled once for all streams."""
        return state.make_stream_step(state.split_model(self.model)[0])

    @functools.cached_property
    def params(self) -> state.Params:
        """The parameters of the model, a pure dict of arrays."""
        return state.split_model(self.model)[1]

    def _pipeline(self, splits: Splits, config: PipelineConfig) -> Pipeline:
        return Pipeline(splits, config, seed=self.config.train.seed, normalizer=self.normalizer)

    def _sample(self, name: str, inputs: dict[str, np.ndarray], mask: dict[str, np.ndarray]) -> Sample:
        task, length = self.info.task, len(next(iter(inputs.values()), ()))
        shape = ((length,) if task.per == "step" else ()) + (() if task.kind == "classification" else (task.n_outputs,))
        label = np.zeros(shape, np.int32 if task.kind == "classification" else np.float32)  # Unknown; never read.
        return {"inputs": inputs, "label": label, "id": name, "mask": mask}

    def _from_memory(self, inputs: Mapping, masks: Mapping) -> list[Sample]:
        counts = {name: len(values) for name, values in inputs.items()}
        if len(set(counts.values())) != 1:
            raise DataError(f"the modalities hold different numbers of sequences: {counts}; expected one number")
        n_samples = next(iter(counts.values()))
        if not n_samples:
            raise DataError("there are no sequences to predict; expected at least one of each modality")
        return [
            self._sample(
                str(i),
                {name: np.asarray(values[i]) for name, values in inputs.items()},
                {name: np.asarray(values[i]) for name, values in masks.items()},
            )
            for i in range(n_samples)
        ]

    def _read(self, path: pathlib.Path) -> list[Sample]:
        files = sorted(path.rglob("*.npz")) if path.is_dir() else [path]
        if not files or not path.exists():
            raise UserError(f"{path}: expected an .npz file or a folder that holds some; found none")
        return [self._read_file(file, str(file.relative_to(path)) if path.is_dir() else file.name) for file in files]

    def _read_file(self, file: pathlib.Path, name: str) -> Sample:
        try:
            with np.load(file, allow_pickle=False) as arrays:
                inputs = {m: arrays[m] for m in self.info.features if m in arrays}
                masks = {m: arrays[m + _MASK] for m in self.info.features if m + _MASK in arrays}
        except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
            raise UserError(f"{file} cannot be read ({error}); write it with np.savez, numeric arrays only") from error
        inputs = {m: values[:, None] if values.ndim == 1 else values for m, values in inputs.items()}
        return self._sample(name, inputs, masks)


def load_run(run_dir: str | os.PathLike, *, which: str = "best") -> Run:
    """Loads a trained model.

    Args:
        run_dir: folder of the run, e.g. ``runs/watch/001``.
        which: its "best" or its "last" checkpoint.

    Raises:
        UserError: the folder is none of a run, or the checkpoint is missing or damaged.
    """
    run_dir = pathlib.Path(run_dir).expanduser()
    config = runs.read_config(run_dir)
    if config.train.seeds:
        names = ", ".join(f"seed_{seed}" for seed in config.train.seeds)
        raise UserError(f"{run_dir} holds the runs of several seeds; name one of its subfolders: {names}")
    info = runs.read_info(run_dir)
    normalizer = Normalizer.from_dict(runs.read_json(run_dir / "normalizer.json"))
    model = CoupledMamba(config.model, features=info.features, task=info.task, rngs=nnx.Rngs(config.train.seed))
    graphdef, params = state.split_model(model)
    params, position = checkpoint.load_params(run_dir / "checkpoints", params, name=which)
    return Run(run_dir, config, info, normalizer, nnx.merge(graphdef, params), position.epoch)


def interpret(info: DataInfo, logits: np.ndarray, thresholds: Sequence[float]) -> tuple[np.ndarray, tuple]:
    """What logits [..., K] mean: the ``outputs`` and ``labels`` of `Prediction`.

    Args:
        info: task and label names.
        logits: of one sequence [K] or of several predictions [L, K].
        thresholds: probabilities above which a label counts as predicted, see `EvaluationConfig`.
    """
    match info.task.kind:
        case "classification":
            best = np.atleast_1d(logits.argmax(-1))
            return special.softmax(logits, axis=-1), tuple(info.label_names[k] for k in best)
        case "multilabel":
            outputs = special.expit(logits)
            names = np.array(info.label_names)
            chosen = np.atleast_2d(metrics.decide(logits, thresholds))
            return outputs, tuple(tuple(names[row].tolist()) for row in chosen)
    return logits, ()


def format_predictions(predictions: Iterable[Prediction], info: DataInfo, kind: str) -> str:
    """Predictions as text.

    Args:
        predictions: from `Run.predict`.
        info: of the run.
        kind: "csv": one row a sequence (or step), with a column for each output; "jsonl": one object a sequence.
    """
    names = info.label_names or tuple(f"output_{k}" for k in range(info.task.n_outputs))
    text = io.StringIO()
    if kind == "jsonl":
        for p in predictions:
            record = {"id": p.id, "names": names, "outputs": p.outputs.tolist()}
            labels = p.labels[0] if p.labels and info.task.per == "sequence" else p.labels
            text.write(json.dumps(record | ({"label": labels} if p.labels else {})) + "\n")
        return text.getvalue()
    writer = csv.writer(text, lineterminator="\n")
    per_step, labelled = info.task.per == "step", info.task.kind != "regression"
    writer.writerow(["id", *["step"] * per_step, *["label"] * labelled, *names])
    for p in predictions:
        for step, row in enumerate(np.atleast_2d(p.outputs)):
            label = p.labels[step] if labelled else ""
            label = "|".join(label) if isinstance(label, tuple) else label
            writer.writerow([p.id, *[step] * per_step, *[label] * labelled, *(f"{v:.6g}" for v in row)])
    return text.getvalue()
