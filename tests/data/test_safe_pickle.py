"""Plain data comes back unchanged; a pickle that names anything else runs nothing."""

import codecs
import os
import pathlib
import pickle

import numpy as np
import pytest

from cmamba_jax.data import safe_pickle
from cmamba_jax.data.checks import DataError

PLAIN = {
    "floats": np.arange(6.0).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big endian": np.arange(3, dtype=">i4"),
    "strings": np.array(["ab", "c"]),
    "objects": np.array(["text", None, 3], dtype=object),
    "scalar": np.float32(2.5),
    "string scalar": np.str_("中"),
    "empty": np.zeros((0, 3), np.float32),
    "list": [np.arange(2), 1, 2.5, True, None, b"bytes", ("a", {"b": []})],
}


def save(path, value, protocol):
    path.write_bytes(pickle.dumps(value, protocol))
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_data_comes_back(tmp_path, protocol):
    loaded = safe_pickle.load(save(tmp_path / "data.pkl", PLAIN, protocol))
    np.testing.assert_equal(loaded, PLAIN)
    assert loaded["floats"].dtype == np.float64 and loaded["fortran"].flags.f_contiguous


def test_npy_with_an_object(tmp_path):
    np.save(tmp_path / "data.npy", PLAIN, allow_pickle=True)
    np.testing.assert_equal(np.asarray(safe_pickle.load(tmp_path / "data.npy")).item(), PLAIN)


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("function", [os.mkdir, pathlib.Path.mkdir, eval], ids=lambda function: function.__qualname__)
def test_code_is_refused_and_not_run(tmp_path, protocol, function):
    made = tmp_path / "made"
    argument = {os.mkdir: str(made), pathlib.Path.mkdir: made, eval: f"__import__('os').mkdir({str(made)!r})"}[function]
    path = save(tmp_path / "data.pkl", {"x": Call(function, argument)}, protocol)
    with pytest.raises(DataError, match=r"data.pkl: holds .* not loaded .* save it again"):
        safe_pickle.load(path)
    assert not made.exists()


@pytest.mark.parametrize("call", [Call(bytes, 3), Call(bytes, [1])], ids=["zeros", "content"])
def test_bytes_are_made_of_nothing_but_nothing(tmp_path, call):
    with pytest.raises(DataError, match="holds builtins.bytes|no readable pickle"):
        safe_pickle.load(save(tmp_path / "data.pkl", call, 2))


@pytest.mark.parametrize("value", [{1, 2}, 1 + 2j, np.ma.array([1]), range(3)], ids=lambda value: type(value).__name__)
def test_other_types_are_refused(tmp_path, value):
    with pytest.raises(DataError, match=r"holds .* not loaded .* save it again"):
        safe_pickle.load(save(tmp_path / "data.pkl", value, 2))


@pytest.mark.parametrize("value", [np.zeros(2, "datetime64[s]"), np.zeros(2, [("a", "f4")])])
def test_other_dtypes_are_refused(tmp_path, value):
    with pytest.raises(DataError, match="expected numbers or strings"):
        safe_pickle.load(save(tmp_path / "data.pkl", value, 4))


def test_other_encodings_are_refused(tmp_path):
    with pytest.raises(DataError, match="expected 'latin1'"):
        safe_pickle.load(save(tmp_path / "data.pkl", Call(codecs.encode, "x", "zlib"), 2))


def test_arrays_cannot_be_laid_over_foreign_memory(tmp_path):
    with pytest.raises(DataError, match="no readable pickle"):
        safe_pickle.load(save(tmp_path / "data.pkl", Call(np.ndarray, (1,), np.dtype(object), b"12345678"), 4))


@pytest.mark.parametrize("cut", [0, 1, 40, -5])
def test_damaged_file(tmp_path, cut):
    path = tmp_path / "data.pkl"
    path.write_bytes(pickle.dumps(PLAIN)[:cut])
    with pytest.raises(DataError, match=r"data.pkl is no readable pickle .* get the file again"):
        safe_pickle.load(path)


def test_absent_file(tmp_path):
    with pytest.raises(DataError, match=r"data.pkl does not exist .* correct the path"):
        safe_pickle.load(tmp_path / "data.pkl")
