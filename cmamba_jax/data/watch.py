"""The watch data: accelerometer and gyroscope of a smart watch during shoulder exercises.

140 series of 10 people, 7 exercises and both arms at 50 Hz (Burns et al., arXiv 1802.01489); the package
seglearn carries them. They are cut into windows and prepared once with tensorflow-datasets.
"""

import dataclasses
import hashlib
import importlib.util
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from cmamba_jax.config import TaskConfig, WatchConfig
from cmamba_jax.data import records, safe_pickle
from cmamba_jax.data.checks import DataError
from cmamba_jax.data.dataset import DataInfo, Sample, Splits

EXERCISES = {
    "PEN": "pendulum",
    "ABD": "abduction",
    "FEL": "forward elevation",
    "IR": "internal rotation",
    "ER": "external rotation",
    "TRAP": "trapezius extension",
    "ROW": "upright row",
}
"""Code in the file and name of each class, in the order of the labels."""

COLUMNS = {"accelerometer": ["ax", "ay", "az"], "gyroscope": ["wx", "wy", "wz"]}
"""Columns of each modality, in their order in the file."""

_SHA256 = "eb122f23cdf06ef6bd6c6c5312958ec5cf9d038e2e6d457b8081662c75a42537"
_SUBJECT = "subject_"


def load(config: WatchConfig) -> Splits:
    """Opens the windows of the watch data, preparing them in ``config.data_dir`` on the first use.

    The people, in the order of their numbers, form a circle of ``n_folds`` consecutive folds of equal size
    (the first ones larger by one where that does not come out even). The test set is fold ``fold``, the
    validation set the ``n_valid_subjects`` people that follow it on the circle, the training set all others.

    Args:
        config: source, window, stride and split.

    Returns:
        Splits of modalities 'accelerometer' and 'gyroscope' [window, 3] with an int label.

    Raises:
        DataError: if the source is absent or not as expected, or the split leaves nobody for a part.
    """
    if config.window < 1 or config.stride < 1:
        raise DataError(f"window={config.window} and stride={config.stride}: expected both at least 1")
    builder = _prepared(config)
    subjects = sorted(int(split.removeprefix(_SUBJECT)) for split in builder.info.splits)
    parts = split_subjects(subjects, config.n_folds, config.fold, config.n_valid_subjects)
    info = DataInfo(
        features={name: len(columns) for name, columns in COLUMNS.items()},
        task=TaskConfig(kind="classification", n_outputs=len(EXERCISES)),
        label_names=tuple(EXERCISES.values()),
    )
    return Splits(info, **{split: _Windows(builder, people) for split, people in parts.items()})


def split_subjects(subjects: Sequence[int], n_folds: int, fold: int, n_valid_subjects: int) -> dict[str, list[int]]:
    """Splits sorted subjects into train, valid and test, as `load` describes.

    Raises:
        DataError: if a part would be empty or the fold does not exist.
    """
    if not 2 <= n_folds <= len(subjects) or not 0 <= fold < n_folds:
        raise DataError(
            f"fold={fold} of n_folds={n_folds}: expected 2 to {len(subjects)} folds (there are {len(subjects)} people) "
            "and a fold below n_folds, counted from 0"
        )
    test = np.array_split(subjects, n_folds)[fold].tolist()
    start = subjects.index(test[-1]) + 1
    others = [person for person in [*subjects[start:], *subjects[:start]] if person not in test]
    if not 1 <= n_valid_subjects < len(others):
        raise DataError(
            f"n_valid_subjects={n_valid_subjects}: expected 1 to {len(others) - 1} of the {len(others)} people outside "
            "the test fold"
        )
    return {"train": sorted(others[n_valid_subjects:]), "valid": sorted(others[:n_valid_subjects]), "test": test}


@dataclasses.dataclass
class WatchBuilderConfig(tfds.core.BuilderConfig):
    """One cut of one file into windows.

    Attributes:
        source: path of watch_dataset.npy; None: the copy inside the installed package seglearn.
        window: steps of a window.
        stride: steps between the starts of consecutive windows.
    """

    source: pathlib.Path | None = None
    window: int = 100
    stride: int = 50


class CmambaWatch(tfds.core.GeneratorBasedBuilder):
    """Windows of the watch data, one TFDS split for each person.

    The windows of a series start at 0, stride, 2 * stride, ... as long as a whole window fits; what remains
    at the end is left out. Records keep the order of the series.
    """

    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded. TFDS would look for checksums beside this file, by a package that it does not declare.
    code_path = None

    def _info(self) -> tfds.core.DatasetInfo:
        shape = (self.builder_config.window, 3)
        return tfds.core.DatasetInfo(
            builder=self,
            description="Accelerometer and gyroscope of a smart watch: 7 shoulder exercises, 10 people, 50 Hz.",
            homepage="https://arxiv.org/abs/1802.01489",
            features=tfds.features.FeaturesDict(
                {
                    **{name: tfds.features.Tensor(shape=shape, dtype=np.float32) for name in COLUMNS},
                    "label": tfds.features.ClassLabel(names=list(EXERCISES.values())),
                    "subject": np.int64,
                    "side": tfds.features.ClassLabel(names=["left", "right"]),
                    "series": np.int64,
                    "start": np.int64,
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        data = read_source(self.builder_config.source or _bundled_source())
        window = self.builder_config.window
        people = {int(data["subject"][i]) for i, series in enumerate(data["X"]) if len(series) >= window}
        if not people:
            raise DataError(
                f"window={window} is longer than every series (the longest has {max(map(len, data['X']))} steps); "
                "choose a shorter data.window"
            )
        return {f"{_SUBJECT}{person:02d}": self._generate_examples(data, person) for person in sorted(people)}

    def _generate_examples(self, data: Mapping[str, Any], person: int) -> Iterator[tuple[int, dict[str, Any]]]:
        window, stride = self.builder_config.window, self.builder_config.stride
        key = 0
        for series in np.flatnonzero(data["subject"] == person):
            values = np.asarray(data["X"][series], np.float32)
            for start in range(0, len(values) - window + 1, stride):
                cut = values[start : start + window]
                record = {"accelerometer": cut[:, :3], "gyroscope": cut[:, 3:]}
                record |= {name: int(data[source][series]) for name, source in (("label", "y"), ("side", "side"))}
                yield key, {**record, "subject": person, "series": int(series), "start": start}
                key += 1


def read_source(path: pathlib.Path) -> dict[str, Any]:
    """Reads watch_dataset.npy and checks its keys and shapes.

    Returns:
        X: list of series [L, 6]; y, subject, side (1: right): int [series]; X_labels and y_labels: names.

    Raises:
        DataError: if the file is absent or not as expected.
    """
    array = np.asarray(safe_pickle.load(path))
    data = array.item() if array.shape == () else None
    keys = {"X", "y", "subject", "side", "X_labels", "y_labels"}
    if not isinstance(data, dict) or not keys <= data.keys():
        came = sorted(map(str, data)) if isinstance(data, dict) else type(data).__name__
        raise DataError(f"{path}: expected a dict of {', '.join(sorted(keys))}, got {came}; {_CURE}")
    columns = [column for names in COLUMNS.values() for column in names]
    for key, names in (("X_labels", columns), ("y_labels", list(EXERCISES))):
        if list(data[key]) != names:
            raise DataError(f"{path}: expected {key} {names}, got {list(data[key])}; {_CURE}")
    for series, values in enumerate(data["X"]):
        shape = np.shape(values)
        if len(shape) != 2 or shape[1] != len(columns):
            raise DataError(f"{path}: series {series} has shape {list(shape)}, expected [L, {len(columns)}]; {_CURE}")
    for key, highest in (("y", len(EXERCISES) - 1), ("side", 1), ("subject", None)):
        values = np.asarray(data[key])
        if values.shape != (len(data["X"]),) or values.dtype.kind not in "iuf" or (values != values.astype(int)).any():
            raise DataError(
                f"{path}: {key} has shape {list(values.shape)}, expected {len(data['X'])} integers; {_CURE}"
            )
        if values.min() < 0 or (highest is not None and values.max() > highest):
            allowed = "0 or more" if highest is None else f"0..{highest}"
            raise DataError(f"{path}: {key} lies in {values.min()}..{values.max()}, expected {allowed}; {_CURE}")
        data[key] = values.astype(int)
    return data


_CURE = "use the file watch_dataset.npy of the package seglearn 1.2.5, or write yours in its format"


def _bundled_source() -> pathlib.Path:
    """The file inside the installed package seglearn, found without importing it (it needs scikit-learn)."""
    cure = 'install it by `pip install "cmamba-jax[data]"`, or set data.source to the path of watch_dataset.npy'
    spec = importlib.util.find_spec("seglearn")
    if spec is None or spec.origin is None:
        raise DataError(f"the watch data comes with the package seglearn, which is not installed; {cure}")
    path = pathlib.Path(spec.origin).parent / "data" / "watch_dataset.npy"
    if not path.is_file():
        raise DataError(f"{path} is absent from the installed package seglearn; {cure}")
    if _sha256(path) != _SHA256:
        raise DataError(f"{path} is not the file of seglearn 1.2.5 that the published results rest on; {cure}")
    return path


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _builder_config(config: WatchConfig) -> WatchBuilderConfig:
    """The name tells the cut, and for a file of the user's its content, so that records of two never mix."""
    name, source = f"window{config.window}_stride{config.stride}", None
    if config.source is not None:
        source = pathlib.Path(config.source).expanduser()
        if not source.is_file():
            raise DataError(f"{source} does not exist (expected watch_dataset.npy); correct data.source")
        digest = _sha256(source)
        name += "" if digest == _SHA256 else f"_{digest[:12]}"
    # pyrefly: ignore[unexpected-keyword]  # A field of the base class, which is imported lazily.
    return WatchBuilderConfig(name=name, source=source, window=config.window, stride=config.stride)


def _prepared(config: WatchConfig) -> CmambaWatch:
    """The builder with its records in data_dir."""
    builder_config = _builder_config(config)
    data_dir = pathlib.Path(config.data_dir).expanduser()
    return records.prepared(lambda: CmambaWatch(config=builder_config, data_dir=data_dir, file_format="array_record"))


class _Windows:
    def __init__(self, builder: CmambaWatch, people: Sequence[int]):
        self._source = builder.as_data_source(split="+".join(f"{_SUBJECT}{person:02d}" for person in people))

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Sample:
        record = self._source[range(len(self))[index]]
        return {
            "inputs": {name: record[name] for name in COLUMNS},
            "label": int(record["label"]),
            "id": f"subject {record['subject']}, series {record['series']}, step {record['start']}",
        }
