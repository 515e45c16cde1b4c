"""Every notebook runs from top to bottom, in reduced size; its text and its .ipynb are one notebook.

After a change of notebooks/*.py: pytest tests/test_notebooks.py --update-golden, which runs them in full size and
writes the .ipynb files.
"""

import base64
import importlib.metadata
import io
import pathlib
import re
import sys
import types

import jax
import jupytext
import nbclient
import nbformat
import PIL.Image
import pytest

from cmamba_jax import versions
from cmamba_jax.errors import UserError

FOLDER = pathlib.Path(__file__).parent.parent / "notebooks"
TEXTS = sorted(FOLDER.glob("*.py"))
LARGEST = 250_000
"""Bytes of a notebook with its outputs."""


def sources(notebook):
    return [(cell.cell_type, cell.source.strip()) for cell in notebook.cells]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_runs_from_top_to_bottom(path, request, monkeypatch, tmp_path):
    update = request.config.getoption("--update-golden")
    if update:
        monkeypatch.delenv("XLA_FLAGS", raising=False)
    else:
        monkeypatch.setenv("CMAMBA_NOTEBOOK_REDUCED", "1")
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))
    notebook = jupytext.read(path)
    place = {"metadata": {"path": tmp_path}}
    nbclient.NotebookClient(notebook, timeout=290, kernel_name="python3", resources=place).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("scan:" in output.get("text", "") for output in outputs[:2])
    assert not [output for output in outputs if output.output_type == "error"]
    if update:
        write(notebook, path.with_suffix(".ipynb"))


def write(notebook, path):
    """The executed notebook, without what differs from run to run or belongs to this machine."""
    for i, cell in enumerate(notebook.cells):
        cell.id = f"{path.stem}-{i}".replace("_", "-")
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [shrunk(o) for o in cell.outputs if o.get("name") != "stderr"]
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
    nbformat.write(notebook, path)


def shrunk(output):
    """The output with a smaller picture: 640 dots wide, 64 colours."""
    if png := output.get("data", {}).get("image/png"):
        picture = PIL.Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
        picture.thumbnail((640, 1200))
        file = io.BytesIO()
        picture.quantize(64).save(file, "PNG", optimize=True)
        output["data"]["image/png"] = base64.b64encode(file.getvalue()).decode()
    return output


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_text_and_notebook_are_one(path):
    notebook = nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    assert sources(notebook) == sources(jupytext.read(path)), "run pytest tests/test_notebooks.py --update-golden"
    text = path.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert len(text) < LARGEST
    assert not re.search(r"/(tmp|home|root|work)/", text) and "Traceback" not in text
    assert any(cell.get("outputs") for cell in notebook.cells)


def test_there_are_five_and_every_one_starts_alike():
    assert [path.stem[0] for path in TEXTS] == list("abcde")
    for path in TEXTS:
        badge, install, environment, *_ = jupytext.read(path).cells
        assert f"notebooks/{path.stem}.ipynb" in badge.source and "colab-badge.svg" in badge.source
        assert "check_versions()" in install.source and "describe_environment()" in environment.source
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == {path.stem for path in TEXTS}


def test_versions_that_suit():
    versions.check_versions()
    lines = versions.describe_environment().splitlines()
    assert (
        lines[0].startswith("Python 3.")
        and lines[1] == f"devices: {jax.device_count()} x cpu (cpu)"
        and lines[2].startswith("scan: xla (")
    )


def test_versions_that_do_not(monkeypatch):
    real = importlib.metadata.version

    def old(name):
        return "0.9.0" if name == "flax" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", old)
    with pytest.raises(UserError, match=r'run `pip install -U "flax>=0.12.8"` and restart the session'):
        versions.check_versions()

    def absent(name):
        if name == "optax":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(UserError, match="optax: nothing is installed"):
        versions.check_versions()
    monkeypatch.setattr(importlib.metadata, "version", real)
    monkeypatch.setitem(sys.modules, "flax", types.SimpleNamespace(__version__="0.1"))
    with pytest.raises(UserError, match="flax 0.1 was imported before .* restart the session"):
        versions.check_versions()
