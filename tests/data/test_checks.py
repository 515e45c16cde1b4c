"""Each fault of a sample is one message that names the place, what was expected and the cure."""

import numpy as np
import pytest

from cmamba_jax.config import TaskConfig
from cmamba_jax.data.checks import DataError, checked
from cmamba_jax.data.dataset import DataInfo
from cmamba_jax.errors import UserError

L = 5


def make_info(kind="classification", n_outputs=3, per="sequence"):
    return DataInfo(features={"b": 2, "a": 1}, task=TaskConfig(kind=kind, n_outputs=n_outputs, per=per))


def make_sample(**changes):
    inputs = {"a": np.ones((L, 1)), "b": np.ones((L, 2))}
    return {"inputs": inputs, "label": 1, "id": "s7", **changes}


def test_complete_form():
    values = np.ones((L, 2))
    values[3] = np.nan
    mask = np.arange(L) != 3
    sample = checked(make_sample(inputs={"a": np.ones((L, 1)), "b": values}, mask={"b": mask}), make_info())
    assert list(sample["inputs"]) == list(sample["mask"]) == ["b", "a"]
    assert sample["inputs"]["b"].dtype == np.float32 and sample["label"].dtype == np.int32
    np.testing.assert_array_equal(sample["inputs"]["b"], np.where(mask[:, None], 1, 0) * np.ones((1, 2)))
    np.testing.assert_array_equal(sample["mask"]["b"], mask)
    assert sample["mask"]["a"].all()
    assert np.isnan(values[3]).all(), "the caller's array is left alone"


def test_checking_twice_changes_nothing():
    info = make_info("regression", 1, "step")
    once = checked(make_sample(label=np.arange(L) / 2, label_mask=np.arange(L) > 1), info)
    twice = checked(once, info)
    np.testing.assert_equal(twice, once)


def test_labels_per_step_count_where_a_modality_exists():
    info = make_info(per="step")
    exists = np.array([True, True, False, True, True])
    sample = make_sample(
        label=np.array([0, 1, -1, 2, 99]),
        mask={"a": exists, "b": exists},
        label_mask=np.array([True, True, True, True, False]),
    )
    result = checked(sample, info)
    np.testing.assert_array_equal(result["label_mask"], [True, True, False, True, False])
    np.testing.assert_array_equal(result["label"], [0, 1, 0, 2, 0])


@pytest.mark.parametrize(
    ("kind", "n_outputs", "per", "label", "shape"),
    [
        ("classification", 3, "sequence", np.int64(2), ()),
        ("regression", 1, "sequence", 0.5, (1,)),
        ("regression", 1, "step", np.zeros(L), (L, 1)),
        ("regression", 2, "sequence", [1, 2], (2,)),
        ("multilabel", 3, "sequence", [0, 1, 1], (3,)),
        ("multilabel", 3, "step", np.ones((L, 3), bool), (L, 3)),
    ],
)
def test_label_shapes(kind, n_outputs, per, label, shape):
    result = checked(make_sample(label=label), make_info(kind, n_outputs, per))["label"]
    assert result.shape == shape
    assert result.dtype == (np.int32 if kind == "classification" else np.float32)


A, B = np.ones((L, 1)), np.ones((L, 2))
HOLE = np.where(np.arange(L)[:, None] == 3, np.nan, B)


@pytest.mark.parametrize(
    ("changes", "info", "message"),
    [
        ({"inputs": {"a": A, "b": np.ones((L, 4))}}, make_info(), r"'b' has shape \[5, 4\], expected \[L, 2\]"),
        ({"inputs": {"a": A, "b": np.ones((0, 2))}}, make_info(), "L >= 1"),
        ({"inputs": {"a": A, "b": B, "c": B}}, make_info(), "unknown modality 'c' .expected b, a.; rename"),
        ({"inputs": {"a": A}}, make_info(), r"'b' is absent .* mask\['b'\] all False"),
        ({"inputs": {"a": A, "b": np.ones((9, 2))}}, make_info(), "different lengths .* resample them"),
        ({"inputs": {"a": A, "b": HOLE}}, make_info(), r"nan at step 3, feature 0 .* mask\['b'\]\[3\] = False"),
        ({"inputs": {"a": A, "b": B * np.inf}}, make_info(), "holds inf at step 0"),
        ({"mask": {"a": np.zeros(L, bool), "b": np.zeros(L, bool)}}, make_info(), "masked at every step"),
        ({"mask": {"c": np.ones(L, bool)}}, make_info(), "mask of an unknown modality 'c'"),
        ({"mask": {"a": np.ones(4, bool)}}, make_info(), r"mask\['a'\] has shape \[4\] .* expected \[5\]"),
        ({"mask": {"a": np.ones(L)}}, make_info(), "dtype float64, expected .* bool"),
        ({"label": 3}, make_info(), r"label 3 \(expected a class in 0..2"),
        ({"label": -1}, make_info(), "label -1"),
        ({"label": 1.0}, make_info(), "dtype float64, expected integers"),
        ({"label": np.array([0, 0, 0, 5, 0])}, make_info(per="step"), "label 5 at step 3 .*label_mask"),
        ({"label": np.zeros(4, int)}, make_info(per="step"), r"shape \[4\] .* shape \[5\]"),
        ({"label": [1.0, 2.0, 3.0]}, make_info("regression", 2), r"shape \[3\] .* shape \[2\]"),
        ({"label": np.nan}, make_info("regression", 1), "finite numbers"),
        ({"label": "high"}, make_info("regression", 1), "expected numbers"),
        ({"label": [0, 1, 2]}, make_info("multilabel", 3), "expected 0 or 1"),
    ],
)
def test_faults(changes, info, message):
    with pytest.raises(DataError, match=message) as caught:
        checked(make_sample(**changes), info)
    assert "sample 's7'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_data_error_is_a_mistake_of_the_user():
    assert issubclass(DataError, UserError)
