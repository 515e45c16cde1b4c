"""CMU-MOSI by utterance: one video is one sequence, with a label at every utterance.

The features of each utterance (text 100, audio 73, video 100) come from the CSV files of
declare-lab/multimodal-deep-learning; a manifest gives the video and the place of every row.

The text and video features of the training videos carry their labels: logistic regression on the text classifies
99.3% of the utterances of held-out training videos (this module's validation split, seed 0) and 75.5% of the test set,
on the video features 92.9% and 52.1%. Validation scores therefore say little about the test set.
"""

import csv
import functools
import pathlib
from collections.abc import Iterator, Mapping

import numpy as np
import tensorflow_datasets as tfds

from cmamba_jax.config import MosiContextualConfig, TaskConfig
from cmamba_jax.data import records
from cmamba_jax.data.checks import DataError
from cmamba_jax.data.dataset import DataInfo, Sample, Splits

MODALITIES = ("text", "audio", "video")
LABELS = ("negative", "positive")

_PARTS = ("train", "test")
_FILES = (*(f"{m}_{part}.csv" for part in _PARTS for m in MODALITIES), "manifest.csv")
_COLUMNS = ("split", "row", "video_id", "utterance", "label")
_WHAT = "the contextual CMU-MOSI files"


def load(config: MosiContextualConfig) -> Splits:
    """Opens the videos, preparing them in ``config.data_dir`` on the first use.

    The test set is that of the files. The validation set is a share of the training videos, drawn by
    ``config.split_seed``; a video is never divided.

    Args:
        config: folder of the files, share and seed of the validation videos.

    Returns:
        Splits of modalities 'text', 'audio' and 'video' [L, F] with L labels, 0 (negative) or 1 (positive); the
        name of a sample is its video.

    Raises:
        DataError: if a file is absent or not as expected, or the share leaves a split without a video.
    """
    folder = records.folder_with(config.path, _FILES, _WHAT)
    builder = records.prepared_from(
        CmambaMosiContextual,
        [folder / name for name in _FILES],
        functools.partial(read, folder),
        name="mosi_contextual",
        data_dir=config.data_dir,
    )
    n_videos = builder.info.splits["train"].num_examples
    n_valid = round(n_videos * config.valid_fraction)
    if not 1 <= n_valid < n_videos:
        raise DataError(
            f"data.valid_fraction is {config.valid_fraction}: {n_valid} of {n_videos} training videos would be for "
            "validation (expected at least 1, and 1 left to train on); change it"
        )
    order = np.random.default_rng(config.split_seed).permutation(n_videos)
    valid, train = np.sort(order[:n_valid]), np.sort(order[n_valid:])
    splits = {
        "train": records.Records(builder, "train", _sample, train),
        "valid": records.Records(builder, "train", _sample, valid),
        "test": records.Records(builder, "test", _sample),
    }
    first = splits["train"][0]["inputs"]
    info = DataInfo(
        features={name: first[name].shape[1] for name in MODALITIES},
        task=TaskConfig(kind="classification", n_outputs=len(LABELS), per="step"),
        label_names=LABELS,
    )
    return Splits(info, **splits)


class CmambaMosiContextual(records.SequenceBuilder):
    """The videos of CMU-MOSI as sequences of utterances; TFDS splits train and test."""

    MODALITIES = MODALITIES
    OTHERS = {"label": tfds.features.Tensor(shape=(None,), dtype=np.int64)}  # noqa: RUF012 (as the base class)
    DESCRIPTION = "CMU-MOSI, features and sentiment of each utterance, one video a sequence."
    HOMEPAGE = "https://github.com/declare-lab/multimodal-deep-learning"


def read(folder: pathlib.Path) -> Mapping[str, Iterator[records.Record]]:
    """Reads and checks the files: per split, the videos in the order of their names.

    Raises:
        DataError: if a file is not as expected, or the files contradict each other.
    """
    manifest = _read_manifest(folder / "manifest.csv")
    widths = {}
    parts = {}
    for part in _PARTS:
        tables = {m: records.read_numbers(folder / f"{m}_{part}.csv") for m in MODALITIES}
        rows = [row for row in manifest if row["split"] == part]
        if sorted(int(row["row"]) for row in rows) != list(range(len(rows))) or not rows:
            raise DataError(
                f"{folder}/manifest.csv: the rows of split {part} are not numbered 0..{len(rows) - 1}, each once; "
                "get the file again"
            )
        labels = np.zeros(len(rows), np.int64)
        for row in rows:
            labels[int(row["row"])] = int(row["label"])
        for name, table in tables.items():
            path = folder / f"{name}_{part}.csv"
            if len(table) != len(rows):
                raise DataError(
                    f"{path} has {len(table)} rows, expected {len(rows)}, those of manifest.csv; get both again"
                )
            if (wrong := np.flatnonzero(table[:, -1] != labels)).size:
                raise DataError(
                    f"{path}: row {wrong[0]} has the label {table[wrong[0], -1]:g} in its last column, but "
                    f"{labels[wrong[0]]} in manifest.csv; get both again"
                )
            if widths.setdefault(name, table.shape[1]) != table.shape[1]:
                raise DataError(
                    f"{path} has {table.shape[1]} columns, but the training file has {widths[name]}; get both again"
                )
        parts[part] = _videos(rows, tables, labels)
    return parts


def _videos(rows: list[dict[str, str]], tables: Mapping[str, np.ndarray], labels: np.ndarray) -> Iterator:
    for video in sorted({row["video_id"] for row in rows}):
        utterances = sorted((int(row["utterance"]), int(row["row"])) for row in rows if row["video_id"] == video)
        order = [row for _, row in utterances]
        inputs = {name: table[order, :-1].astype(np.float32) for name, table in tables.items()}
        yield {**inputs, "label": labels[order], "id": video}


def _read_manifest(path: pathlib.Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    if missing := [name for name in _COLUMNS if name not in (reader.fieldnames or ())]:
        raise DataError(
            f"{path} lacks the columns {', '.join(missing)} (expected {', '.join(_COLUMNS)}); get the file again"
        )
    for number, row in enumerate(rows):
        numeric = all((row[name] or "").isdigit() for name in ("row", "utterance", "label"))
        if row["split"] not in _PARTS or not numeric or int(row["label"]) >= len(LABELS):
            raise DataError(
                f"{path}: entry {number} is {', '.join(str(row[name]) for name in _COLUMNS)} (expected train or test, "
                "and whole numbers for row, utterance and label, the label 0 or 1); get the file again"
            )
    return rows


def _sample(record: records.Record) -> Sample:
    return {
        "inputs": {name: record[name] for name in MODALITIES},
        "label": record["label"].astype(np.int32),
        "id": record["id"],
    }
