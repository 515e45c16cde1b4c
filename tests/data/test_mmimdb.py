"""MultiBench's MM-IMDb file: splits by row, vectors to sequences, and faults."""

import sys

import h5py
import numpy as np
import pytest

from cmamba_jax import data
from cmamba_jax.config import MmImdbConfig
from cmamba_jax.data import mmimdb
from cmamba_jax.data.checks import DataError, checked

ROWS, WIDTHS, GENRES = 13, {"features": 5, "vgg_features": 8}, 4


@pytest.fixture
def write(tmp_path, monkeypatch):
    """A file of the same layout with fewer rows."""
    assert list(mmimdb.BOUNDS.values()) == [(0, 15552), (15552, 18160), (18160, 25959)]
    monkeypatch.setattr(mmimdb, "BOUNDS", {"train": (0, 7), "valid": (7, 9), "test": (9, ROWS)})

    def write(n_steps=1, **changes):
        rng = np.random.default_rng(0)
        content = {key: rng.normal(size=(ROWS, width)) for key, width in WIDTHS.items()}
        content |= {"genres": rng.integers(0, 2, (ROWS, GENRES)), "imdb_ids": np.arange(ROWS), **changes}
        with h5py.File(tmp_path / "multimodal_imdb.hdf5", "w") as file:
            for key, values in content.items():
                if values is not None:
                    file[key] = values
        path = str(tmp_path / "multimodal_imdb.hdf5")
        return content, MmImdbConfig(path=path, data_dir=str(tmp_path / "prepared"), n_steps=n_steps)

    return write


def test_rows_become_the_samples_of_the_splits(write):
    content, config = write()
    splits = data.load(config)
    assert splits.info.features == {"text": 5, "image": 8}
    assert (splits.info.task.kind, splits.info.task.n_outputs) == ("multilabel", GENRES)
    rows = [*splits.train, *splits.valid, *splits.test]
    assert [len(splits.train), len(splits.valid), len(splits.test)] == [7, 2, 4]
    for row, sample in enumerate(rows):
        sample = checked(sample, splits.info)
        assert sample["id"] == f"row {row}"
        np.testing.assert_array_equal(sample["label"], content["genres"][row])
        np.testing.assert_allclose(sample["inputs"]["text"], content["features"][row][None], rtol=1e-6)
        np.testing.assert_allclose(sample["inputs"]["image"], content["vgg_features"][row][None], rtol=1e-6)


def test_groups_of_features_become_steps(write):
    content, config = write(n_steps=2)
    splits = data.load(config)
    assert splits.info.features == {"text": 3, "image": 4}
    np.testing.assert_allclose(splits.test[0]["inputs"]["text"].ravel(), [*content["features"][9], 0], rtol=1e-6)
    with pytest.raises(DataError, match="data.n_steps is 6, expected 1 to 5"):
        data.load(write(n_steps=6)[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"genres": None}, "lacks genres .expected features, vgg_features and genres"),
        ({"features": np.ones((12, 5))}, r"features has shape \[12, 5\], expected \[13, F\]"),
        ({"vgg_features": np.ones(ROWS)}, r"vgg_features has shape \[13\]"),
    ],
)
def test_files_that_do_not_fit(write, changes, message):
    with pytest.raises(DataError, match=message):
        data.load(write(**changes)[1])


def test_other_faults(write, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="data.path is '', expected the file multimodal_imdb.hdf5"):
        data.load(MmImdbConfig())
    (tmp_path / "text.hdf5").write_text("no film")
    with pytest.raises(DataError, match=r"text.hdf5 is no readable HDF5 file .* get it again"):
        data.load(MmImdbConfig(path=str(tmp_path / "text.hdf5"), data_dir=str(tmp_path)))
    _, config = write()
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(DataError, match=r'pip install "cmamba-jax\[mmimdb\]"'):
        data.load(config)
