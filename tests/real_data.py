"""Where the tests find the real data sets, which are not part of the repository."""

import os
import pathlib

import pytest

_DEFAULT = pathlib.Path(__file__).parents[2] / "shared" / "data"


def folder(name: str) -> str:
    """Folder of a data set; the test is skipped where it is absent."""
    path = pathlib.Path(os.environ.get("CMAMBA_TEST_DATA", _DEFAULT)) / name
    if not path.is_dir():
        pytest.skip(f"needs the {name} files in {path}; CMAMBA_TEST_DATA names another folder than {_DEFAULT}")
    return str(path)
