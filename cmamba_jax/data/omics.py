"""Multi-omics classification in MOGONET's layout: BRCA and ROSMAP.

Three views of each patient, every one a vector of features: mRNA expression, DNA methylation and miRNA expression.
A vector becomes a sequence of ``n_steps`` groups of consecutive features; the published code of Coupled Mamba
uses one step.
"""

import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from sklearn.model_selection import train_test_split

from cmamba_jax.config import OmicsConfig, TaskConfig
from cmamba_jax.data import records
from cmamba_jax.data.checks import DataError
from cmamba_jax.data.dataset import DataInfo, Sample, Splits

VIEWS = ("mrna", "methylation", "mirna")
"""The modalities, in the order of the files' numbers 1, 2, 3."""

_PARTS = {"train": "tr", "test": "te"}
_FILES = tuple(
    name
    for part in _PARTS.values()
    for name in (*(f"{i + 1}_{part}.csv" for i in range(len(VIEWS))), f"labels_{part}.csv")
)
_WHAT = "a MOGONET data set (ROSMAP or BRCA)"


def load(config: OmicsConfig) -> Splits:
    """Opens the patients, preparing them in ``config.data_dir`` on the first use.

    The test set is that of the files. The validation set is a share of the training rows, stratified by class and
    drawn by ``config.split_seed``. Each feature is scaled to 0..1 over the rows that are left to train on, whatever
    ``pipeline.normalize`` adds; files for `cmamba predict` have to be scaled in the same way.

    Args:
        config: folder of the files, steps, share and seed of the validation rows.

    Returns:
        Splits of modalities 'mrna', 'methylation' and 'mirna' [n_steps, ceil(F / n_steps)] with an int label. Where F
        is no multiple of n_steps, the last group is filled up with zeros.

    Raises:
        DataError: if a file is absent or not as expected, or the configuration does not fit it.
    """
    folder = records.folder_with(config.path, _FILES, _WHAT)
    builder = records.prepared_from(
        CmambaOmics,
        [folder / name for name in _FILES],
        functools.partial(read, folder),
        name="omics",
        data_dir=config.data_dir,
    )
    source = records.Records(builder, "train", lambda record: record)
    rows = [source[i] for i in range(len(source))]
    labels = np.array([row["label"] for row in rows])
    train, valid = _holdout(labels, config)
    scaling = {}
    for name in VIEWS:
        values = np.concatenate([rows[i][name] for i in train])
        low, high = values.min(axis=0), values.max(axis=0)
        scaling[name] = low, np.where(high > low, high - low, np.float32(1))
    records.check_steps(config.n_steps, {name: len(low) for name, (low, _) in scaling.items()})
    make = _maker(scaling, config.n_steps)
    n_classes = int(labels.max()) + 1
    info = DataInfo(
        features={name: -(-len(low) // config.n_steps) for name, (low, _) in scaling.items()},
        task=TaskConfig(kind="classification", n_outputs=n_classes),
        label_names=tuple(str(i) for i in range(n_classes)),
    )
    return Splits(
        info,
        train=records.Records(builder, "train", make, train),
        valid=records.Records(builder, "train", make, valid),
        test=records.Records(builder, "test", make),
    )


class CmambaOmics(records.SequenceBuilder):
    """Patients of a MOGONET data set, each view a sequence of one step; TFDS splits train and test."""

    MODALITIES = VIEWS
    OTHERS = {"label": np.int64}  # noqa: RUF012 (as the base class)
    DESCRIPTION = "Multi-omics classification: mRNA, methylation and miRNA features of patients."
    HOMEPAGE = "https://github.com/txWang/MOGONET"


def read(folder: pathlib.Path) -> Mapping[str, Iterator[records.Record]]:
    """Reads and checks the files: per split, the patients in the order of the rows.

    Raises:
        DataError: if a file is not as expected, or the files contradict each other.
    """
    parts, widths = {}, {}
    for split, part in _PARTS.items():
        labels = records.read_numbers(folder / f"labels_{part}.csv").ravel()
        if (labels != labels.astype(int)).any() or labels.min() < 0:
            raise DataError(f"{folder}/labels_{part}.csv: expected classes 0, 1, ..., one a row; get the file again")
        views = {}
        for number, name in enumerate(VIEWS, start=1):
            path = folder / f"{number}_{part}.csv"
            views[name] = values = records.read_numbers(path)
            if len(values) != len(labels):
                raise DataError(
                    f"{path} has {len(values)} rows, expected {len(labels)}, one for each row of labels_{part}.csv; "
                    "get both again"
                )
            if widths.setdefault(name, values.shape[1]) != values.shape[1]:
                raise DataError(
                    f"{path} has {values.shape[1]} columns, but {number}_tr.csv has {widths[name]}; get both again"
                )
        parts[split] = _patients(views, labels.astype(np.int64), split)
    return parts


def _patients(views: Mapping[str, np.ndarray], labels: np.ndarray, split: str) -> Iterator[records.Record]:
    for row, label in enumerate(labels):
        inputs = {name: values[row : row + 1].astype(np.float32) for name, values in views.items()}
        yield {**inputs, "label": label, "id": f"{split}/{row}"}


def _holdout(labels: np.ndarray, config: OmicsConfig) -> tuple[np.ndarray, np.ndarray]:
    """Sorted rows to train on and to validate on."""
    try:
        train, valid = train_test_split(
            np.arange(len(labels)), test_size=config.valid_fraction, random_state=config.split_seed, stratify=labels
        )
    except ValueError as error:
        raise DataError(
            f"data.valid_fraction is {config.valid_fraction}, which does not divide {len(labels)} training rows of "
            f"{len(np.unique(labels))} classes ({error}); change it"
        ) from error
    return np.sort(train), np.sort(valid)


def _maker(scaling: Mapping[str, tuple[np.ndarray, np.ndarray]], n_steps: int) -> Callable[[records.Record], Sample]:
    def make(record: records.Record) -> Sample:
        inputs = {}
        for name, (low, extent) in scaling.items():
            inputs[name] = records.grouped((record[name][0] - low) / extent, n_steps)
        return {"inputs": inputs, "label": int(record["label"]), "id": record["id"]}

    return make
