"""Reads pickles that hold numpy arrays, lists, dicts, strings and numbers, and refuses all others.

A pickle can name any function of any module and have it called. Here the few names that arrays are pickled
with lead to the small constructors below, and every other name is an error.
"""

import pathlib
import pickle
from typing import Any, Literal

import numpy as np

from cmamba_jax.data.checks import DataError


def load(path: str | pathlib.Path) -> Any:
    """Reads a pickle, or an .npy file that holds a pickled object.

    Args:
        path: the file.

    Returns:
        The object. Its arrays belong to a subclass of np.ndarray; np.asarray gives plain ones.

    Raises:
        DataError: if the file is absent, damaged, or holds anything but plain data.
    """
    path = pathlib.Path(path).expanduser()
    if not path.is_file():
        raise DataError(f"{path} does not exist (expected a pickled data file); correct the path")
    try:
        with path.open("rb") as file:
            if file.read(len(np.lib.format.MAGIC_PREFIX)) == np.lib.format.MAGIC_PREFIX:
                file.seek(0)
                np.lib.format.read_magic(file)
                np.lib.format.read_array_header_1_0(file)
            else:
                file.seek(0)
            return _Unpickler(file).load()
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except Exception as error:  # A damaged pickle can raise anything.
        raise DataError(f"{path} is no readable pickle ({error}); get the file again") from error


class _Dtype:
    """Stands for np.dtype: takes no state but the byte order, since a forged one could break memory safety."""

    def __init__(self, code: str, align: bool | int = False, copy: bool | int = False):
        self.value = np.dtype(code)
        if self.value.kind not in "biufSUO":
            raise DataError(f"holds an array of dtype {self.value} (expected numbers or strings)")

    def __setstate__(self, state: tuple):
        self.value = self.value.newbyteorder(state[1])


class _Array(np.ndarray):
    """An array whose pickled state names its dtype by a `_Dtype`."""

    def __setstate__(self, state: tuple):
        version, shape, dtype, fortran_order, content = state
        super().__setstate__((version, shape, dtype.value, fortran_order, content))


def _reconstruct(subtype: object, shape: tuple, code: bytes) -> _Array:
    return _Array((0,))


def _from_buffer(content: bytes | bytearray, dtype: _Dtype, shape: tuple, order: Literal["C", "F"]) -> np.ndarray:
    return np.frombuffer(content, dtype.value).reshape(shape, order=order)


def _scalar(dtype: _Dtype, content: bytes) -> np.generic:
    return np.frombuffer(content, dtype.value)[0]


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise DataError(f"encodes bytes as {encoding!r} (expected 'latin1')")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    return b""  # How protocol 2 writes the content of an empty array.


_ADMITTED = {
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): "ndarray",  # Only ever an argument of _reconstruct, so nothing that can be called.
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _no_bytes,
    **{
        (f"numpy.{core}.{module}", name): function
        for core in ("core", "_core")
        for module, name, function in (
            ("multiarray", "_reconstruct", _reconstruct),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _from_buffer),
        )
    },
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise DataError(
                f"holds {module}.{name}, which is not loaded because a pickle can run any code (expected only numpy "
                "arrays, lists, dicts, strings and numbers); save it again as such"
            ) from None
