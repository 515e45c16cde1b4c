"""MOGONET's files: views to sequences, scaling by the training rows, stratified validation."""

import dataclasses

import numpy as np
import pytest
import real_data

from cmamba_jax import data
from cmamba_jax.config import OmicsConfig
from cmamba_jax.data.checks import DataError, checked

WIDTHS = {"mrna": 7, "methylation": 6, "mirna": 4}
ROWS = {"tr": 30, "te": 9}


def tables():
    rng = np.random.default_rng(0)
    for part, n_rows in ROWS.items():
        for number, width in enumerate(WIDTHS.values(), start=1):
            yield f"{number}_{part}.csv", rng.normal(3, 2, (n_rows, width))
        yield f"labels_{part}.csv", (np.arange(n_rows) % 3).astype(float)


@pytest.fixture
def config(tmp_path):
    for name, table in tables():
        np.savetxt(tmp_path / name, table, delimiter=",")
    return OmicsConfig(path=str(tmp_path), data_dir=str(tmp_path / "prepared"))


def stacked(samples, name):
    return np.stack([sample["inputs"][name] for sample in samples])


def test_views_are_scaled_by_the_rows_to_train_on(config):
    splits = data.load(config)
    assert splits.info.features == WIDTHS and splits.info.task.n_outputs == 3
    original = dict(tables())
    rows = [int(sample["id"].removeprefix("train/")) for sample in splits.train]
    for number, name in enumerate(WIDTHS, start=1):
        train = original[f"{number}_tr.csv"][rows]
        low, high = train.min(axis=0), train.max(axis=0)
        test = (original[f"{number}_te.csv"] - low) / (high - low)
        np.testing.assert_allclose(stacked(splits.test, name)[:, 0], test, rtol=1e-4, atol=1e-5)
        assert stacked(splits.train, name).min() == 0 and stacked(splits.train, name).max() == 1
    for sample in splits.test:
        row = int(sample["id"].removeprefix("test/"))
        assert checked(sample, splits.info)["label"] == row % 3


def test_validation_is_stratified_and_drawn_by_seed(config):
    splits = data.load(config)
    assert len(splits.train) == 24 and len(splits.valid) == 6
    assert np.bincount([sample["label"] for sample in splits.valid]).tolist() == [2, 2, 2]
    ids = {frozenset(s["id"] for s in data.load(dataclasses.replace(config, split_seed=i)).valid) for i in (0, 0, 1)}
    assert len(ids) == 2
    with pytest.raises(DataError, match="data.valid_fraction is 0.01, which does not divide 30 training rows"):
        data.load(dataclasses.replace(config, valid_fraction=0.01))


def test_groups_of_features_become_steps(config):
    one, two = data.load(config), data.load(dataclasses.replace(config, n_steps=2))
    assert two.info.features == {"mrna": 4, "methylation": 3, "mirna": 2}
    for a, b in zip(one.test, two.test, strict=True):
        for name, width in WIDTHS.items():
            assert len(b["inputs"][name]) == 2
            flat = b["inputs"][name].ravel()
            np.testing.assert_array_equal(flat[:width], a["inputs"][name][0])
            assert not flat[width:].any()
    for n_steps in (0, 5):
        with pytest.raises(DataError, match=f"data.n_steps is {n_steps}, expected 1 to 4"):
            data.load(dataclasses.replace(config, n_steps=n_steps))


@pytest.mark.parametrize(
    ("name", "table", "message"),
    [
        ("2_te.csv", np.ones((9, 5)), "has 5 columns, but 2_tr.csv has 6"),
        ("3_tr.csv", np.ones((29, 4)), "has 29 rows, expected 30, one for each row of labels_tr.csv"),
        ("labels_te.csv", np.full(9, 0.5), "expected classes 0, 1, ..., one a row"),
        ("1_tr.csv", np.full((30, 7), np.nan), "row 0, column 0 is nan"),
    ],
)
def test_files_that_do_not_fit(config, tmp_path, name, table, message):
    np.savetxt(tmp_path / name, table, delimiter=",")
    with pytest.raises(DataError, match=f"{name}.*{message}"):
        data.load(config)


def test_the_real_rosmap_files(tmp_path):
    splits = data.load(OmicsConfig(path=real_data.folder("rosmap"), data_dir=str(tmp_path)))
    assert splits.info.features == dict.fromkeys(WIDTHS, 200) and splits.info.task.n_outputs == 2
    assert [len(part) for part in (splits.train, splits.valid, splits.test)] == [196, 49, 106]
    assert np.isfinite(stacked(splits.test, "mirna")).all()
