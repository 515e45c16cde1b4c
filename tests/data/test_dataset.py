"""Data sets of arrays in memory: the splits cover the samples, and the task follows from the labels."""

import itertools

import numpy as np
import pytest

from cmamba_jax import data
from cmamba_jax.config import SyntheticConfig
from cmamba_jax.data.checks import DataError, checked

N, L = 40, 6


def make(labels=None, inputs=None, **options):
    inputs = inputs or {"imu": np.arange(N * L * 2.0).reshape(N, L, 2)}
    return data.from_arrays(inputs, np.arange(N) % 4 if labels is None else labels, **options)


def rows(split):
    return [int(sample["id"]) for sample in split]


def test_splits_are_disjoint_and_complete():
    splits = make(valid_fraction=0.1, test_fraction=0.25)
    parts = [rows(part) for part in (splits.train, splits.valid, splits.test)]
    assert [len(part) for part in parts] == [26, 4, 10]
    assert sorted(itertools.chain(*parts)) == list(range(N))
    assert all(part == sorted(part) for part in parts)
    sample = splits.test[3]
    row = int(sample["id"])
    assert sample["label"] == row % 4
    np.testing.assert_array_equal(sample["inputs"]["imu"][0], [row * L * 2, row * L * 2 + 1])


def test_the_seed_decides_the_split():
    assert rows(make(seed=1).test) == rows(make(seed=1).test) != rows(make(seed=2).test)


def test_groups_stay_together():
    groups = np.array([f"person {i % 7}" for i in range(N)])
    splits = make(groups=groups)
    parts = [set(groups[rows(part)]) for part in (splits.train, splits.valid, splits.test)]
    assert [len(part) for part in parts] == [5, 1, 1]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])


@pytest.mark.parametrize(
    ("labels", "options", "task"),
    [
        (np.arange(N) % 4, {}, ("classification", 4, "sequence")),
        (np.arange(N) % 4, {"label_names": "abcdef"}, ("classification", 6, "sequence")),
        (np.arange(N) / 2, {}, ("regression", 1, "sequence")),
        (np.ones((N, 3)), {}, ("regression", 3, "sequence")),
        (np.ones((N, 3), int), {"task": "multilabel"}, ("multilabel", 3, "sequence")),
        (np.ones((N, L), int), {"per": "step"}, ("classification", 2, "step")),
        ([np.ones(L)] * N, {"per": "step"}, ("regression", 1, "step")),
        (np.ones((N, L, 5)), {"per": "step"}, ("regression", 5, "step")),
    ],
)
def test_the_task_follows_from_the_labels(labels, options, task):
    splits = make(labels, **options)
    assert (splits.info.task.kind, splits.info.task.n_outputs, splits.info.task.per) == task
    assert len(splits.info.label_names) == (0 if task[0] == "regression" else task[1])
    checked(splits.train[0], splits.info)


def test_lists_masks_and_label_masks():
    lengths = np.arange(N) % 5 + 1
    inputs = {"b": [np.ones((n, 2)) for n in lengths], "a": [np.ones((n, 1)) for n in lengths]}
    masks = {"a": [np.arange(n) > 0 for n in lengths]}
    labels = [np.where(np.arange(n) > 0, 1, 77) for n in lengths]
    splits = make(labels, inputs, masks=masks, label_masks=[np.arange(n) > 0 for n in lengths], per="step")
    assert splits.info.features == {"b": 2, "a": 1} and splits.info.task.n_outputs == 2
    sample = checked(splits.train[2], splits.info)
    n = lengths[int(sample["id"])]
    np.testing.assert_array_equal(sample["mask"]["a"], np.arange(n) > 0)
    np.testing.assert_array_equal(sample["label_mask"], np.arange(n) > 0)
    assert sample["mask"]["b"].all() and sample["label"].max() < 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": {"imu": np.ones((N - 1, L, 2))}}, "imu: 39 samples, expected 40"),
        ({"groups": np.ones(3)}, "groups: 3 samples, expected 40"),
        ({"masks": {"imu": np.ones((2, L), bool)}}, "mask of imu: 2 samples"),
        ({"inputs": {"imu": np.ones((N, L))}}, r"shape \[6\], expected \[L, F\]"),
        ({"labels": np.ones(N), "task": "classification"}, "dtype float64, expected integers"),
        ({"label_names": ["one"]}, "1 label_names for 4 outputs"),
        ({"valid_fraction": 0.5, "test_fraction": 0.5}, "sum below 1"),
        ({"test_fraction": 0.0}, "above 0"),
        ({"groups": np.arange(N) % 2}, "2 groups are too few"),
        ({"labels": [], "inputs": {"imu": []}}, "0 samples of 1 modalities"),
    ],
)
def test_faults(arguments, message):
    with pytest.raises(DataError, match=message):
        make(**arguments)


def test_load_dispatches_on_the_configuration():
    assert len(data.load(SyntheticConfig(n_train=3)).train) == 3
    with pytest.raises(TypeError, match="WatchConfig"):
        data.load({})
