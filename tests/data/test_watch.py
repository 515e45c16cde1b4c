"""The watch data: windows, people, preparation and faults, on a small file of the exact format and on the real one."""

import dataclasses
import importlib.util
import itertools

import numpy as np
import pytest

from cmamba_jax import data
from cmamba_jax.config import WatchConfig
from cmamba_jax.data import watch
from cmamba_jax.data.checks import DataError, checked

SUBJECTS = [9, 2, 2, 4, 5, 7, 11, 4]
LENGTHS = [10, 11, 3, 14, 9, 8, 13, 8]


def content(**changes):
    rng = np.random.default_rng(0)
    return {
        "X": [rng.normal(size=(length, 6)) for length in LENGTHS],
        "y": np.arange(len(SUBJECTS)) % 7,
        "subject": np.array(SUBJECTS),
        "side": np.arange(len(SUBJECTS)) % 2.0,
        "X_labels": ["ax", "ay", "az", "wx", "wy", "wz"],
        "y_labels": ["PEN", "ABD", "FEL", "IR", "ER", "TRAP", "ROW"],
        **changes,
    }


@pytest.fixture
def write(tmp_path):
    def write(**changes):
        path = tmp_path / "watch_dataset.npy"
        np.save(path, content(**changes), allow_pickle=True)
        return WatchConfig(source=str(path), data_dir=str(tmp_path / "prepared"), window=4, stride=3, n_folds=3)

    return write


def test_windows_are_the_slices_of_the_series(write):
    splits = data.load(write())
    series = content()["X"]
    seen = []
    for part in (splits.train, splits.valid, splits.test):
        for sample in part:
            subject, number, start = (int(text.split()[1]) for text in sample["id"].split(", "))
            seen.append((number, start))
            assert subject == SUBJECTS[number] and sample["label"] == number % 7
            cut = series[number][start : start + 4].astype(np.float32)
            checked(sample, splits.info)
            np.testing.assert_array_equal(sample["inputs"]["accelerometer"], cut[:, :3])
            np.testing.assert_array_equal(sample["inputs"]["gyroscope"], cut[:, 3:])
    expected = [(i, start) for i, n in enumerate(LENGTHS) for start in range(0, n, 3) if start + 4 <= n]
    assert sorted(seen) == expected


def test_records_tell_person_side_and_series(write):
    builder = watch._prepared(write())
    records = list(builder.as_data_source(split="subject_04"))
    assert [(r["series"], r["start"]) for r in records] == [(3, 0), (3, 3), (3, 6), (3, 9), (7, 0), (7, 3)]
    assert all(r["subject"] == 4 and r["side"] == 1 for r in records)
    assert builder.info.features["side"].int2str(1) == "right"


def test_prepared_once_and_then_reused(write, monkeypatch, capfd):
    config = write()
    first = data.load(config)
    monkeypatch.setattr(watch, "read_source", lambda path: pytest.fail("prepared again"))
    np.testing.assert_equal(data.load(config).test[1], first.test[1])
    assert capfd.readouterr() == ("", ""), "TFDS is quiet"


def test_another_file_or_cut_is_prepared_anew(write):
    config = write()
    first = data.load(config)
    assert data.load(dataclasses.replace(config, window=5)).test[0]["inputs"]["gyroscope"].shape == (5, 3)
    other = data.load(write(X=[series + 1 for series in content()["X"]]))
    np.testing.assert_allclose(
        other.test[0]["inputs"]["gyroscope"], first.test[0]["inputs"]["gyroscope"] + 1, rtol=1e-5, atol=1e-6
    )


def test_two_processes_may_prepare_at_once(write, monkeypatch):
    config, read_source = write(), watch.read_source

    def read_while_another_process_finishes(path):
        monkeypatch.setattr(watch, "read_source", read_source)
        data.load(config)
        return read_source(path)

    monkeypatch.setattr(watch, "read_source", read_while_another_process_finishes)
    assert len(data.load(config).train) > 0


def test_each_person_is_tested_once_and_in_one_part_only():
    subjects = list(range(1, 12))
    parts = [watch.split_subjects(subjects, 5, fold, 2) for fold in range(5)]
    assert sorted(itertools.chain(*(part["test"] for part in parts))) == subjects
    assert len({tuple(part["valid"]) for part in parts}) == 5
    for part in parts:
        assert len(part["valid"]) == 2
        assert sorted(part["train"] + part["valid"] + part["test"]) == subjects
    assert parts[0] == {"train": [6, 7, 8, 9, 10, 11], "valid": [4, 5], "test": [1, 2, 3]}
    assert parts[4]["valid"] == [1, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_folds": 1}, "expected 2 to 10 folds"),
        ({"n_folds": 11}, "there are 10 people"),
        ({"fold": 5}, "fold below n_folds"),
        ({"n_valid_subjects": 0}, "expected 1 to 7 of the 8 people"),
        ({"n_valid_subjects": 8}, "expected 1 to 7 of the 8 people"),
    ],
)
def test_impossible_splits(changes, message):
    with pytest.raises(DataError, match=message):
        watch.split_subjects(list(range(10)), **{"n_folds": 5, "fold": 0, "n_valid_subjects": 1, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"X": [np.ones((9, 5))] * 8}, r"series 0 has shape \[9, 5\], expected \[L, 6\]"),
        ({"y": np.arange(8)}, r"y lies in 0..7, expected 0..6"),
        ({"y": np.arange(7)}, r"y has shape \[7\], expected 8 integers"),
        ({"side": np.full(8, 0.5)}, "side has shape .* expected 8 integers"),
        ({"X_labels": ["ax"]}, "expected X_labels .* got .'ax'."),
        ({"y_labels": ["PEN"]}, "expected y_labels"),
    ],
)
def test_a_file_that_does_not_fit(write, changes, message):
    with pytest.raises(DataError, match=f"watch_dataset.npy: {message}.* use the file watch_dataset.npy"):
        data.load(write(**changes))


def test_other_faults(write, tmp_path):
    config = write()
    np.save(config.source, {"X": []}, allow_pickle=True)
    with pytest.raises(DataError, match="expected a dict of X, .* got .'X'."):
        data.load(config)
    with pytest.raises(DataError, match="absent.npy does not exist .* correct data.source"):
        data.load(WatchConfig(source=str(tmp_path / "absent.npy"), data_dir=str(tmp_path)))
    with pytest.raises(DataError, match="window=0 and stride=50"):
        data.load(WatchConfig(window=0, data_dir=str(tmp_path)))


def test_window_longer_than_every_series(write):
    config = dataclasses.replace(write(), window=15)
    with pytest.raises(DataError, match="window=15 is longer than every series .the longest has 14 steps.; choose"):
        data.load(config)


def test_without_seglearn_the_message_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r'pip install "cmamba-jax\[data\]"`, or set data.source'):
        data.load(WatchConfig(data_dir=str(tmp_path)))


@pytest.mark.skipif(importlib.util.find_spec("seglearn") is None, reason="needs the watch data of the package seglearn")
def test_the_real_file(tmp_path):
    splits = data.load(WatchConfig(data_dir=str(tmp_path)))
    assert [len(part) for part in (splits.train, splits.valid, splits.test)] == [3271, 305, 1101]
    assert splits.info.features == {"accelerometer": 3, "gyroscope": 3}
    assert len(splits.info.label_names) == splits.info.task.n_outputs == 7
    assert {sample["id"].split(",")[0] for sample in splits.test} == {"subject 1", "subject 2"}
    assert {sample["label"] for sample in splits.valid} == set(range(7))
    # Gravity: at rest a watch measures about 1 g.
    norms = [np.linalg.norm(sample["inputs"]["accelerometer"], axis=1).mean() for sample in splits.valid]
    assert 0.9 < np.median(norms) < 1.2
