"""MM-IMDb: genres of films from the plot and the poster, in the file multimodal_imdb.hdf5 that MultiBench uses.

Each modality is one vector, a text feature of 300 numbers and a VGG feature of 4,096, which becomes a sequence of
``n_steps`` groups of consecutive features.
"""

import functools
import pathlib
from collections.abc import Iterator, Mapping

import numpy as np
import tensorflow_datasets as tfds

from cmamba_jax.config import MmImdbConfig, TaskConfig
from cmamba_jax.data import records
from cmamba_jax.data.checks import DataError
from cmamba_jax.data.dataset import DataInfo, Sample, Splits

KEYS = {"text": "features", "image": "vgg_features"}
"""Name of each modality in the file."""

BOUNDS = {"train": (0, 15552), "valid": (15552, 18160), "test": (18160, 25959)}
"""First row of each split, and the row behind its last."""


def load(config: MmImdbConfig) -> Splits:
    """Opens the films, preparing them in ``config.data_dir`` on the first use.

    Args:
        config: file and number of steps.

    Returns:
        MultiBench's splits of modalities 'text' and 'image' [n_steps, ceil(F / n_steps)] with a 0/1 label for each
        genre; genres are numbered as in the file.

    Raises:
        DataError: if h5py or the file is absent, the file is not as expected, or the configuration does not fit it.
    """
    path = pathlib.Path(config.path).expanduser()
    if not config.path or not path.is_file():
        raise DataError(f"data.path is {config.path!r}, expected the file multimodal_imdb.hdf5; correct it")
    builder = records.prepared_from(
        CmambaMmImdb, [path], functools.partial(read, path), name="mmimdb", data_dir=config.data_dir
    )
    first = records.Records(builder, "train", lambda record: record)[0]
    widths = {name: first[name].shape[1] for name in KEYS}
    records.check_steps(config.n_steps, widths)

    def make(record: records.Record) -> Sample:
        inputs = {name: records.grouped(record[name][0], config.n_steps) for name in KEYS}
        return {"inputs": inputs, "label": record["label"], "id": record["id"]}

    n_genres = len(first["label"])
    info = DataInfo(
        features={name: -(-width // config.n_steps) for name, width in widths.items()},
        task=TaskConfig(kind="multilabel", n_outputs=n_genres),
        label_names=tuple(str(i) for i in range(n_genres)),
    )
    return Splits(info, **{split: records.Records(builder, split, make) for split in BOUNDS})


class CmambaMmImdb(records.SequenceBuilder):
    """Films, each modality a sequence of one step; TFDS splits train, valid and test."""

    MODALITIES = tuple(KEYS)
    OTHERS = {"label": tfds.features.Tensor(shape=(None,), dtype=np.float32)}  # noqa: RUF012 (as the base class)
    DESCRIPTION = "MM-IMDb: features of plots and posters, and the genres of the films."
    HOMEPAGE = "https://github.com/pliang279/MultiBench"


def read(path: pathlib.Path) -> Mapping[str, Iterator[records.Record]]:
    """Checks the file: per split, the films in its order; rows are read one by one.

    Raises:
        DataError: if h5py is absent or the file is not as expected.
    """
    try:
        import h5py
    except ImportError:
        raise DataError('reading MM-IMDb needs h5py; install it by `pip install "cmamba-jax[mmimdb]"`') from None
    try:
        with h5py.File(path, "r") as file:
            shapes = {key: file[key].shape for key in (*KEYS.values(), "genres") if key in file}
    except OSError as error:
        raise DataError(f"{path} is no readable HDF5 file ({error}); get it again") from error
    n_rows = max(stop for _, stop in BOUNDS.values())
    for key in (*KEYS.values(), "genres"):
        if key not in shapes:
            raise DataError(f"{path} lacks {key} (expected {', '.join(KEYS.values())} and genres); get it again")
        if len(shapes[key]) != 2 or shapes[key][0] != n_rows:
            raise DataError(
                f"{path}: {key} has shape {list(shapes[key])}, expected [{n_rows}, F], the films of MultiBench's file; "
                "get it again"
            )

    def films(start: int, stop: int) -> Iterator[records.Record]:
        with h5py.File(path, "r") as file:
            for row in range(start, stop):
                inputs = {name: np.asarray(file[key][row], np.float32)[None] for name, key in KEYS.items()}
                yield {**inputs, "label": np.asarray(file["genres"][row], np.float32), "id": f"row {row}"}

    return {split: films(*bounds) for split, bounds in BOUNDS.items()}
