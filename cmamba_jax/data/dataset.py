"""What a data set is: its description, its samples and its three splits."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from cmamba_jax.config import (
    DataConfig,
    Granularity,
    MmImdbConfig,
    MmsaConfig,
    MosiContextualConfig,
    NpzConfig,
    OmicsConfig,
    SyntheticConfig,
    TaskConfig,
    TaskKind,
    WatchConfig,
)
from cmamba_jax.data.checks import DataError

Column = np.ndarray | Sequence[npt.ArrayLike]
"""One entry for each sample: an array, or a sequence of arrays or numbers."""


@dataclasses.dataclass(frozen=True)
class DataInfo:
    """What holds for every sample of a data set.

    Attributes:
        features: width F of each modality; the order is that of the modalities.
        task: what is predicted.
        label_names: names of the classes or labels, for reports; empty for regression.
    """

    features: dict[str, int]
    task: TaskConfig
    label_names: tuple[str, ...] = ()


class Sample(typing.TypedDict):
    """One sequence.

    Attributes:
        inputs: per modality, float [L, F]; one L for all.
        label: classification int, regression float [K], multilabel 0/1 [K]; per step with a leading axis [L].
        id: names the sample in messages.
        mask: per modality, bool [L], False where the modality is missing; absent: it exists everywhere.
        label_mask: bool [L], False where the label of a step does not count; absent: all count.
    """

    inputs: dict[str, np.ndarray]
    label: typing.Any
    id: str
    mask: typing.NotRequired[dict[str, np.ndarray]]
    label_mask: typing.NotRequired[np.ndarray]


@typing.runtime_checkable
class Samples(typing.Protocol):
    """Random access to samples; lists have it, and so have classes that read or make a sample when it is indexed."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


@dataclasses.dataclass(frozen=True)
class Splits:
    """A data set: a description and the samples of three splits.

    Attributes:
        info: what holds for every sample.
        train: samples to learn from.
        valid: samples that choose the epoch and the settings.
        test: samples that the result is reported on.
    """

    info: DataInfo
    train: Samples
    valid: Samples
    test: Samples


def load(config: DataConfig) -> Splits:
    """Opens the data set that a configuration describes, preparing it where that is needed.

    Args:
        config: one of the classes of `config.DataConfig`.

    Returns:
        The splits; samples are read or made when they are indexed.

    Raises:
        DataError: if the files are absent or not as expected, or the configuration does not fit them.
    """
    # Imported here because each reader needs libraries that the others do not.
    match config:
        case WatchConfig():
            from cmamba_jax.data import watch

            return watch.load(config)
        case SyntheticConfig():
            from cmamba_jax.data import synthetic

            return synthetic.load(config)
        case NpzConfig():
            from cmamba_jax.data import npz

            return npz.load(config)
        case MosiContextualConfig():
            from cmamba_jax.data import mosi_contextual

            return mosi_contextual.load(config)
        case OmicsConfig():
            from cmamba_jax.data import omics

            return omics.load(config)
        case MmsaConfig():
            from cmamba_jax.data import mmsa

            return mmsa.load(config)
        case MmImdbConfig():
            from cmamba_jax.data import mmimdb

            return mmimdb.load(config)
    known = ", ".join(choice.__name__ for choice in typing.get_args(DataConfig))
    raise TypeError(f"expected one of {known}, got {type(config).__name__}")


def from_arrays(
    inputs: Mapping[str, Column],
    labels: Column,
    *,
    masks: Mapping[str, Column] | None = None,
    label_masks: Column | None = None,
    task: TaskKind | None = None,
    per: Granularity = "sequence",
    label_names: Sequence[str] = (),
    groups: Column | None = None,
    valid_fraction: float = 0.15,
    test_fraction: float = 0.15,
    seed: int = 0,
) -> Splits:
    """Makes a data set of arrays in memory and splits it at random.

    Example:
        >>> import numpy as np
        >>> from cmamba_jax import data
        >>> from cmamba_jax.config import PipelineConfig
        >>> rng = np.random.default_rng(0)
        >>> imu = rng.normal(size=(200, 50, 6))                              # [N, L, F]
        >>> sound = [rng.normal(size=(50, 20)) for _ in range(200)]          # or N arrays [L_i, F]
        >>> splits = data.from_arrays({"imu": imu, "sound": sound}, labels=rng.integers(0, 3, 200))
        >>> pipeline = data.Pipeline(splits, PipelineConfig(batch_size=16), seed=0)
        >>> batch = next(pipeline.train())
        >>> {name: values.shape for name, values in batch.inputs.items()}
        {'imu': (16, 50, 6), 'sound': (16, 50, 20)}

    Args:
        inputs: per modality [N, L, F], or N arrays [L_i, F]; within a sample the modalities share L_i.
        labels: N labels: integers (classification), floats [N] or [N, K] (regression), 0/1 [N, K] (multilabel);
            with ``per="step"`` each has a leading time axis.
        masks: per modality bool [N, L] or N arrays [L_i], False where it is missing; absent modalities: nowhere.
        label_masks: with ``per="step"``, bool [N, L] or N arrays [L_i], False where a label does not count.
        task: None: classification for integers, regression for floats; multilabel has to be asked for.
        per: one label per sequence or per step.
        label_names: names of the classes or labels; empty: their numbers.
        groups: N values, e.g. the person of each sample: samples of one group stay in one split.
        valid_fraction: share of the groups (samples, without groups) that is held out for validation.
        test_fraction: share of the groups that is held out for testing.
        seed: seed of the split.

    Returns:
        The splits, each in the order of the arrays.

    Raises:
        DataError: if the arrays disagree or too little is left for a split.
    """
    n_samples = len(labels)
    columns: dict[str, Column | None] = {"labels": labels, "label_masks": label_masks, "groups": groups}
    columns |= {f"modality {name}": values for name, values in inputs.items()}
    columns |= {f"mask of {name}": mask for name, mask in (masks or {}).items()}
    for name, column in columns.items():
        if column is not None and len(column) != n_samples:
            raise DataError(f"{name}: {len(column)} samples, expected {n_samples} (one for each label)")
    if not n_samples or not inputs:
        raise DataError(f"{n_samples} samples of {len(inputs)} modalities, expected at least one of each")
    features = {}
    for name, values in inputs.items():
        first = np.asarray(values[0])
        if first.ndim != 2:
            raise DataError(
                f"modality {name!r}: a sample has shape {list(first.shape)}, expected [L, F]; "
                "give an array [N, L, F] or a list of N arrays [L_i, F] (F = 1 for a single signal)"
            )
        features[name] = first.shape[1]
    kind = task or ("classification" if np.asarray(labels[0]).dtype.kind in "iub" else "regression")
    pairs = ((labels[i], None if label_masks is None else label_masks[i]) for i in range(n_samples))
    task_config, names = describe_task(kind, per, pairs, label_names)
    info = DataInfo(features=features, task=task_config, label_names=names)
    parts = _split(n_samples, groups, valid_fraction, test_fraction, seed)
    return Splits(info, *(_ArraySamples(inputs, labels, masks or {}, label_masks, part) for part in parts))


def describe_task(
    kind: TaskKind,
    per: Granularity,
    labels: Iterable[tuple[npt.ArrayLike, npt.ArrayLike | None]],
    label_names: Sequence[str] = (),
) -> tuple[TaskConfig, tuple[str, ...]]:
    """Finds the number of outputs from the labels.

    Args:
        kind: kind of target.
        per: one label per sequence or per step.
        labels: every label with its label_mask (or None).
        label_names: names of the classes or labels; they set the number of outputs.

    Returns:
        The task, and the names of the outputs (numbers unless given; none for regression).

    Raises:
        DataError: if there are more outputs than names, or classes are no integers.
    """
    n_outputs = 1
    for label, mask in labels:
        label = np.asarray(label)
        if kind == "classification":
            if label.dtype.kind not in "iub":
                raise DataError(
                    f"a label has dtype {label.dtype}, expected integers (classification); "
                    "number the classes 0, 1, ... or set another task"
                )
            label = label if mask is None else label[np.asarray(mask, bool)]
            n_outputs = max(n_outputs, int(label.max(initial=0)) + 1)
        elif label.ndim > (per == "step"):
            n_outputs = max(n_outputs, label.shape[-1])
    if label_names and len(label_names) < n_outputs:
        raise DataError(f"{len(label_names)} label_names for {n_outputs} outputs; name every one, or none")
    n_outputs = len(label_names) or n_outputs
    names = () if kind == "regression" else tuple(label_names) or tuple(str(i) for i in range(n_outputs))
    return TaskConfig(kind=kind, n_outputs=n_outputs, per=per), names


def _split(
    n_samples: int, groups: Column | None, valid_fraction: float, test_fraction: float, seed: int
) -> list[np.ndarray]:
    """Indices of train, valid and test; whole groups are drawn."""
    if min(valid_fraction, test_fraction) <= 0 or valid_fraction + test_fraction >= 1:
        raise DataError(
            f"valid_fraction={valid_fraction} and test_fraction={test_fraction}: expected both above 0, sum below 1"
        )
    names, group = np.unique(np.arange(n_samples) if groups is None else np.asarray(groups), return_inverse=True)
    n_valid, n_test = (max(1, round(len(names) * fraction)) for fraction in (valid_fraction, test_fraction))
    if n_valid + n_test >= len(names):
        raise DataError(
            f"{len(names)} {'samples' if groups is None else 'groups'} are too few for {n_valid} of validation, "
            f"{n_test} of test and some of training; give more, or smaller fractions"
        )
    order = np.random.default_rng(seed).permutation(len(names))
    parts = np.split(order, [len(names) - n_valid - n_test, len(names) - n_test])
    return [np.flatnonzero(np.isin(group, part)) for part in parts]


class _ArraySamples:
    def __init__(
        self,
        inputs: Mapping[str, Column],
        labels: Column,
        masks: Mapping[str, Column],
        label_masks: Column | None,
        rows: np.ndarray,
    ):
        self._inputs, self._labels, self._masks, self._label_masks = inputs, labels, masks, label_masks
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        row = int(self._rows[index])
        sample: Sample = {
            "inputs": {name: np.asarray(values[row]) for name, values in self._inputs.items()},
            "label": self._labels[row],
            "id": str(row),
            "mask": {name: np.asarray(values[row]) for name, values in self._masks.items()},
        }
        if self._label_masks is not None:
            sample["label_mask"] = np.asarray(self._label_masks[row])
        return sample
