"""The wheel, the API reference and the citation, as others meet them."""

import ast
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import tomllib
import zipfile

import cmamba_jax

ROOT = pathlib.Path(__file__).parent.parent


def run(*words, **options):
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_has_all_it_needs_and_runs_the_quick_start(tmp_path):
    """`make wheel` does the same in an environment of its own, with the dependencies installed afresh."""
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "dist", cwd=ROOT)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    site, work = tmp_path / "site", tmp_path / "work"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(site)  # What pip does with a wheel of pure Python.
    assert {"cmamba_jax/train/report.html", "cmamba_jax/deploy/model_card.md"} <= set(names)
    tops = {name.split("/")[0] for name in names}
    assert tops == {"cmamba_jax", "pallas_kernels", f"cmamba_jax-{cmamba_jax.__version__}.dist-info"}
    work.mkdir()
    environment = os.environ | {"PYTHONPATH": str(site)}
    out = run(sys.executable, ROOT / "tests" / "quick_start.py", cwd=work, env=environment)
    assert out.strip().endswith(f"quick start from {site / 'cmamba_jax'}: ok")


def test_the_api_reference_is_built_without_warnings(tmp_path):
    run(sys.executable, ROOT / "tests/api_reference.py", tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    page = (tmp_path / "cmamba_jax" / "deploy" / "streaming.html").read_text(encoding="utf-8")
    assert "StreamingSession" in page and "steps that a late sample may lie behind" in page
    pages = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.html")}
    for module in [*(ROOT / "cmamba_jax").rglob("*.py"), *(ROOT / "pallas_kernels").rglob("*.py")]:
        path = module.relative_to(ROOT).with_suffix(".html")
        path = path.parent.with_suffix(".html") if path.stem == "__init__" else path
        absent = path.parent.name == "triton_gpu" and importlib.util.find_spec("triton") is None
        assert (str(path) in pages) == (path.stem != "__main__" and not absent)


def test_the_citation_names_this_version():
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.*)$", text, flags=re.MULTILINE)[1] == cmamba_jax.__version__
    assert "2405.18014" in text


def test_every_library_that_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    declared = {re.match(r"[\w.-]+", line)[0].lower().replace("-", "_") for line in lines}
    declared |= {"absl", "orbax", "sklearn", "jaxlib", "cmamba_jax", "pallas_kernels"}
    optional = {"torch"}  # Read only where it is installed, see deploy/published.py.
    imported = set()
    for path in [*(ROOT / "cmamba_jax").rglob("*.py"), *(ROOT / "pallas_kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0].lower() for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0].lower())
    assert imported - declared - optional - set(sys.stdlib_module_names) == set()
