"""CMU-MOSI, CMU-MOSEI, CH-SIMS and CH-SIMSv2 as MMSA distributes them: one pickle, aligned or unaligned.

The file is read without running code from it (see `safe_pickle`). Its modalities are text, audio and vision; in an
unaligned file each has its own number of steps, and `resample` brings them to one clock.
"""

import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from cmamba_jax.config import MmsaConfig, TaskConfig
from cmamba_jax.data import records, safe_pickle
from cmamba_jax.data.checks import DataError
from cmamba_jax.data.dataset import DataInfo, Sample, Splits
from cmamba_jax.data.resample import frame_slots, resample

MODALITIES = ("text", "audio", "vision")
CLASSES = ("negative", "neutral", "positive")

COUNTS = {
    "mosi": (1284, 229, 686),
    "mosei": (16326, 1871, 4659),
    "sims": (1368, 456, 457),
    "simsv2": (2722, 647, 1034),
}
"""Samples of train, valid and test in the published files."""

_SPLITS = ("train", "valid", "test")
_KEYS = (*MODALITIES, "id", "regression_labels")
_NO_CLASS = -1


def load(config: MmsaConfig) -> Splits:
    """Opens the samples, preparing them in ``config.data_dir`` on the first use.

    Args:
        config: file, data set, task, and how its modalities are brought to one clock.

    Returns:
        Splits of modalities 'text', 'audio' and 'vision' [L, F], masked behind their true lengths, with the sentiment
        as a number or, for classification, as negative, neutral or positive. Steps at the end that hold nothing are
        left out.

    Raises:
        DataError: if the file is absent or not as expected, or the configuration does not fit it.
    """
    if not config.path:
        raise DataError("data.path is empty; set it to the file of the data set, e.g. --data.path unaligned_50.pkl")
    path = pathlib.Path(config.path).expanduser()
    if not path.is_file():
        raise DataError(f"{path} does not exist (expected a pickle of {config.dataset} from MMSA); correct data.path")
    builder = records.prepared_from(
        CmambaMmsa,
        [path],
        functools.partial(read, path, COUNTS[config.dataset] if config.counts == "published" else None),
        name=f"{config.dataset}_{config.counts}",
        data_dir=config.data_dir,
    )
    first = records.Records(builder, "train", lambda record: record)[0]
    padded = dict(zip(MODALITIES, first["padded"].tolist(), strict=True))
    length = padded["text"] if config.length is None else config.length
    if length < 1:
        raise DataError(f"data.length is {length}, expected at least 1")
    slots = {m: frame_slots(n, length) if config.resample == "frames" else 1 for m, n in padded.items()}
    classes = config.task == "classification"
    if classes and first["class"] == _NO_CLASS:
        raise DataError(f"{path} holds no classification_labels; set data.task to regression")
    info = DataInfo(
        features={m: slots[m] * first[m].shape[1] for m in MODALITIES},
        task=TaskConfig(kind=config.task, n_outputs=len(CLASSES) if classes else 1),
        label_names=CLASSES if classes else (),
    )
    make = _maker(config, length, slots)
    return Splits(info, **{split: records.Records(builder, split, make) for split in _SPLITS})


class CmambaMmsa(records.SequenceBuilder):
    """Utterances with text, audio and vision; TFDS splits train, valid and test.

    The records hold the real steps of each modality (one zero where there is none), how many they are (`lengths`), and
    the steps that the file pads to (`padded`), both in the order text, audio, vision.
    """

    MODALITIES = MODALITIES
    OTHERS = {  # noqa: RUF012 (as the base class)
        "lengths": tfds.features.Tensor(shape=(3,), dtype=np.int64),
        "padded": tfds.features.Tensor(shape=(3,), dtype=np.int64),
        "label": np.float32,
        "class": np.int64,
        "unimodal_labels": tfds.features.Tensor(shape=(3,), dtype=np.float32),
        "raw_text": tfds.features.Text(),
    }
    DESCRIPTION = "Multimodal sentiment of utterances, in the features of MMSA."
    HOMEPAGE = "https://github.com/thuiar/MMSA"


def read(path: pathlib.Path, counts: Sequence[int] | None) -> Mapping[str, Iterator[records.Record]]:
    """Reads and checks the file: per split, the samples in its order.

    Args:
        path: the pickle.
        counts: expected samples of train, valid and test; None: any.

    Raises:
        DataError: if it is not as expected.
    """
    content = safe_pickle.load(path)
    if not isinstance(content, dict) or not set(_SPLITS) <= content.keys():
        came = ", ".join(sorted(map(str, content))) if isinstance(content, dict) else type(content).__name__
        raise DataError(f"{path}: expected a dict of {', '.join(_SPLITS)}, got {came}; use a feature file of MMSA")
    splits = {split: _Split(path, split, content[split]) for split in _SPLITS}
    found = tuple(len(splits[split]) for split in _SPLITS)
    if counts is not None and found != tuple(counts):
        raise DataError(
            f"{path} holds {'/'.join(map(str, found))} samples to train, validate and test, but the published file has "
            f"{'/'.join(map(str, counts))}; correct data.dataset or data.path, or set data.counts to any"
        )
    for split in splits.values():
        for name in MODALITIES:
            wanted, came = splits["train"].arrays[name].shape[1:], split.arrays[name].shape[1:]
            if came != wanted:
                raise DataError(
                    f"{path}: {split.name}/{name} is {list(came)} a sample, but {list(wanted)} in train; get it again"
                )
    return {name: split.samples() for name, split in splits.items()}


class _Split:
    """One split of the file, checked."""

    def __init__(self, path: pathlib.Path, name: str, content: Any):
        self._path, self.name = path, name
        if not isinstance(content, dict) or (missing := [key for key in _KEYS if key not in content]):
            lack = ", ".join(missing) if isinstance(content, dict) else "every key"
            raise DataError(f"{path}: {name} lacks {lack} (expected {', '.join(_KEYS)}); use a feature file of MMSA")
        self._content = content
        self._size = len(content["id"])
        self.arrays = {key: self._array(key, 3) for key in MODALITIES}
        self._labels = {key: self._array(key, 1) for key in content if key.startswith("regression_labels")}
        self._classes = self._array("classification_labels", 1) if "classification_labels" in content else None
        if self._classes is not None and not np.isin(self._classes, range(len(CLASSES))).all():
            raise DataError(f"{path}: {name}/classification_labels holds others than 0, 1 and 2; get the file again")
        for key, labels in self._labels.items():
            if not np.isfinite(labels).all():
                raise DataError(f"{path}: {name}/{key} holds a label that is no finite number; get the file again")
        self._lengths = self._read_lengths()

    def __len__(self) -> int:
        return self._size

    def samples(self) -> Iterator[records.Record]:
        """The records, one by one."""
        padded = np.array([self.arrays[m].shape[1] for m in MODALITIES])
        for i in range(self._size):
            record: records.Record = {"lengths": self._lengths[i], "padded": padded, "id": str(self._content["id"][i])}
            for name, n_real in zip(MODALITIES, self._lengths[i], strict=True):
                values = np.zeros((1, self.arrays[name].shape[2]), np.float32)
                if n_real:
                    values = np.asarray(self.arrays[name][i, :n_real], np.float32)
                record[name] = np.where(np.isneginf(values), np.float32(0), values) if name == "audio" else values
            record["label"] = np.float32(self._labels["regression_labels"][i])
            record["class"] = _NO_CLASS if self._classes is None else int(self._classes[i])
            unimodal = [self._labels.get(f"regression_labels_{m}") for m in "TAV"]
            record["unimodal_labels"] = np.array([np.nan if u is None else u[i] for u in unimodal], np.float32)
            record["raw_text"] = str(self._content["raw_text"][i]) if "raw_text" in self._content else ""
            yield record

    def _read_lengths(self) -> np.ndarray:
        """Real steps of text, audio and vision, int [N, 3]."""
        if "text_bert" in self._content:
            # Token numbers, mask and segments of BERT; the mask is 1 at real tokens.
            text = self._array("text_bert", 3)[:, 1].astype(bool).sum(axis=1)
        elif "text_lengths" in self._content:
            text = self._array("text_lengths", 1)
        else:
            some = (self.arrays["text"] != 0).any(axis=2)
            text = np.where(some.any(axis=1), some.shape[1] - some[:, ::-1].argmax(axis=1), 0)
        lengths = [text]
        for name in MODALITIES[1:]:
            key, n_steps = f"{name}_lengths", self.arrays[name].shape[1]
            if key in self._content:
                lengths.append(self._array(key, 1))
            elif n_steps == self.arrays["text"].shape[1]:
                lengths.append(text)  # Aligned to the words.
            else:
                raise DataError(
                    f"{self._path}: {self.name} lacks {key}, but {name} has {n_steps} steps and text "
                    f"{self.arrays['text'].shape[1]}; use a feature file of MMSA"
                )
        for name, values in zip(MODALITIES, lengths, strict=True):
            n_steps = self.arrays[name].shape[1]
            if values.min(initial=0) < 0 or values.max(initial=0) > n_steps:
                raise DataError(
                    f"{self._path}: the lengths of {self.name}/{name} lie in {values.min()}..{values.max()}, expected "
                    f"0..{n_steps}; get the file again"
                )
        return np.stack(lengths, axis=1).astype(np.int64)

    def _array(self, key: str, ndim: int) -> np.ndarray:
        try:
            array = np.asarray(self._content[key])
            if array.dtype.kind == "O":
                array = array.astype(np.float32)
        except ValueError:
            array = np.empty(0, object)
        if array.ndim == ndim + 1 and ndim == 1 and array.shape[1:] == (1,):
            array = array[:, 0]
        if array.ndim != ndim or len(array) != self._size or array.dtype.kind not in "iufb" or not array.size:
            raise DataError(
                f"{self._path}: {self.name}/{key} has shape {list(array.shape)} and dtype {array.dtype}, expected "
                f"numbers with {ndim} axes, the first of {self._size} samples; use a feature file of MMSA"
            )
        return array


def _maker(config: MmsaConfig, length: int, slots: Mapping[str, int]) -> Callable[[records.Record], Sample]:
    def make(record: records.Record) -> Sample:
        inputs, masks = {}, {}
        for i, name in enumerate(MODALITIES):
            n_real, padded = int(record["lengths"][i]), int(record["padded"][i])
            values = record[name]
            if config.span == "padded" or not n_real:
                values = np.pad(values, ((0, padded - len(values)), (0, 0)))
            if len(values) != length or config.resample == "frames":
                values, mask = resample(values, length, config.resample, n_real=n_real, slots=slots[name])
            else:
                mask = np.arange(length) < n_real
            inputs[name], masks[name] = values, mask
        real = np.flatnonzero(np.any(list(masks.values()), axis=0))
        stop = real[-1] + 1 if real.size else length
        label = int(record["class"]) if config.task == "classification" else np.float32(record["label"])
        return {
            "inputs": {name: values[:stop] for name, values in inputs.items()},
            "mask": {name: mask[:stop] for name, mask in masks.items()},
            "label": label,
            "id": record["id"],
        }

    return make
