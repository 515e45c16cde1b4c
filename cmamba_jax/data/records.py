"""Prepared records: what the readers of downloaded files share.

A reader turns the user's files into records once, with tensorflow-datasets and array_record; later runs open the
records and do not read the files again.
"""

import contextlib
import dataclasses
import hashlib
import io
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import absl.logging
import numpy as np
import tensorflow_datasets as tfds

from cmamba_jax.data.checks import DataError

Record = dict[str, Any]
"""One sample as it is stored: an array [L, F] for each modality, ``label``, ``id`` and what else a builder declares."""

_Builder = TypeVar("_Builder", bound=tfds.core.DatasetBuilder)
_Made = TypeVar("_Made")

_HASHED_WHOLE = 256 * 2**20
_BLOCK, _BLOCKS = 2**20, 64


@dataclasses.dataclass
class SourceConfig(tfds.core.BuilderConfig):
    """The files that records are prepared from; the name tells their content, so that records of two never mix.

    Attributes:
        read: reads and checks the files; gives the records of each split. Called only where nothing is prepared yet.
    """

    read: Callable[[], Mapping[str, Iterator[Record]]] | None = None


class SequenceBuilder(tfds.core.GeneratorBasedBuilder):
    """Sequences of several modalities, of any length and width, with a label and a name.

    Subclasses set what follows; their records are what `SourceConfig.read` yields.
    """

    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded. TFDS would look for checksums beside this file, by a package that it does not declare.
    code_path = None
    MODALITIES: ClassVar[tuple[str, ...]] = ()
    OTHERS: ClassVar[dict[str, Any]] = {}
    DESCRIPTION: ClassVar[str] = ""
    HOMEPAGE: ClassVar[str] = ""

    def _info(self) -> tfds.core.DatasetInfo:
        # The widths stand in the user's file, so none is declared here.
        modality = tfds.features.Tensor(shape=(None, None), dtype=np.float32, encoding="bytes")
        features = {**dict.fromkeys(self.MODALITIES, modality), **self.OTHERS, "id": tfds.features.Text()}
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.DESCRIPTION,
            homepage=self.HOMEPAGE,
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        return {split: self._generate_examples(records) for split, records in self.builder_config.read().items()}

    def _generate_examples(self, records: Iterator[Record]) -> Iterator[tuple[int, Record]]:
        yield from enumerate(records)


class Records(Generic[_Made]):
    """What is made of the prepared records of one split when they are indexed: samples, or the records themselves.

    Args:
        builder: with its records prepared.
        split: name of the TFDS split.
        make: turns a record, whose texts have been decoded, into what is wanted.
        rows: indices of the records that belong to them; None: all.
    """

    def __init__(
        self,
        builder: tfds.core.DatasetBuilder,
        split: str,
        make: Callable[[Record], _Made],
        rows: Sequence[int] | np.ndarray | None = None,
    ):
        self._source = builder.as_data_source(split=split)
        self._make = make
        self._rows = range(len(self._source)) if rows is None else [int(row) for row in rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> _Made:
        record = self._source[self._rows[index]]
        return self._make({k: v.decode() if isinstance(v, bytes) else v for k, v in record.items()})


def prepared(make_builder: Callable[[], _Builder]) -> _Builder:
    """A builder with its records; those that are there are used as they are."""
    with _quiet():
        builder = make_builder()
        if not builder.data_path.exists():
            try:
                builder.download_and_prepare()
            except OSError:
                # TFDS renames a finished folder into place: this fails if another process has just done so.
                if not builder.data_path.exists():
                    raise
                builder = make_builder()
    return builder


def prepared_from(
    builder_class: type[SequenceBuilder],
    paths: Sequence[pathlib.Path],
    read: Callable[[], Mapping[str, Iterator[Record]]],
    *,
    name: str,
    data_dir: str,
) -> SequenceBuilder:
    """The records of some files, prepared in `data_dir` on the first use.

    Args:
        builder_class: declares the records.
        paths: the files; their content decides which records are used.
        read: reads and checks them.
        name: tells what else the records depend on.
        data_dir: where the prepared records are kept.
    """
    # pyrefly: ignore[unexpected-keyword]  # A field of the base class, which is imported lazily.
    config = SourceConfig(name=f"{name}_{fingerprint(paths)[:12]}", read=read)
    folder = pathlib.Path(data_dir).expanduser()
    return prepared(lambda: builder_class(config=config, data_dir=folder, file_format="array_record"))


def fingerprint(paths: Sequence[pathlib.Path]) -> str:
    """SHA-256 of the files' names and contents; of files above 256 MiB, the size and 64 blocks of 1 MiB spread evenly.

    Gigabytes are not read again at the start of every run; a change that keeps the size and misses all blocks is not
    noticed.
    """
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            if size <= _HASHED_WHOLE:
                digest.update(hashlib.file_digest(file, "sha256").digest())
                continue
            for i in range(_BLOCKS):
                file.seek(i * (size - _BLOCK) // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def folder_with(path: str, names: Sequence[str], what: str) -> pathlib.Path:
    """The folder `path`, which has to hold the files `names`.

    Raises:
        DataError: it is empty, no folder, or lacks a file.
    """
    if not path:
        raise DataError(f"data.path is empty; set it to the folder of {what}, e.g. --data.path FOLDER")
    folder = pathlib.Path(path).expanduser()
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder (expected that of {what}); correct data.path")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise DataError(
            f"{folder} lacks {', '.join(missing)} (expected {', '.join(names)}); get the files of {what} again, or "
            "correct data.path"
        )
    return folder


def grouped(vector: np.ndarray, n_steps: int) -> np.ndarray:
    """A vector [F] as a sequence [n_steps, ceil(F / n_steps)] of consecutive features, filled up with zeros."""
    return np.pad(vector, (0, -len(vector) % n_steps)).reshape(n_steps, -1)


def check_steps(n_steps: int, widths: Mapping[str, int]) -> None:
    """Makes sure that vectors of these widths can be divided into `n_steps` groups.

    Raises:
        DataError: they cannot.
    """
    smallest = min(widths.values())
    if not 1 <= n_steps <= smallest:
        raise DataError(
            f"data.n_steps is {n_steps}, expected 1 to {smallest}, the number of features of the smallest modality"
        )


def read_numbers(path: str | os.PathLike) -> np.ndarray:
    """A CSV file of numbers, with or without quotes and without a header, as float64 [rows, columns].

    Raises:
        DataError: it holds something else, or rows of different lengths, or numbers that are not finite.
    """
    try:
        values = np.loadtxt(path, delimiter=",", quotechar='"', ndmin=2)
    except (ValueError, OSError) as error:
        reason = str(error).rstrip(".")
        raise DataError(f"{path} is no table of numbers ({reason}); get the file again") from error
    if not values.size:
        raise DataError(f"{path} is empty (expected rows of numbers); get the file again")
    if not np.isfinite(values).all():
        row, column = np.argwhere(~np.isfinite(values))[0]
        raise DataError(
            f"{path}: row {row}, column {column} is {values[row, column]} (expected a finite number); repair it"
        )
    return values


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences TFDS, which prints to stdout, warns of unregistered configs and draws progress bars."""
    tfds.disable_progress_bar()
    verbosity = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        absl.logging.set_verbosity(verbosity)
