"""The package cmamba_jax.data: its names, and what importing it costs."""

import subprocess
import sys

import pytest

from cmamba_jax import data


@pytest.mark.parametrize("name", data.__all__)
def test_every_public_name_is_found(name):
    assert getattr(data, name).__name__ == name
    assert name in dir(data)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'loader'"):
        data.loader  # noqa: B018


def test_import_loads_no_heavy_library_and_the_pipeline_needs_no_tensorflow():
    code = (
        "import sys, cmamba_jax.data as data\n"
        "assert not {'grain', 'tensorflow_datasets'} & set(sys.modules)\n"
        "import cmamba_jax.data.watch; data.Pipeline\n"
        "assert 'grain' in sys.modules and 'tensorflow' not in sys.modules\n"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert process.stdout == process.stderr == ""
