import importlib
import pathlib
import re

import pytest

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
NAMES = sorted(set(re.findall(r"`((?:cmamba_jax|pallas_kernels)(?:\.\w+)+)`", README)))
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def resolve(name):
    parts = name.split(".")
    value = importlib.import_module(parts[0])
    for i, part in enumerate(parts[1:], start=1):
        try:
            value = getattr(value, part)
        except AttributeError:
            value = importlib.import_module(".".join(parts[: i + 1]))
    return value


def test_readme_names_functions_and_shows_code():
    assert "pallas_kernels.coupled_scan" in NAMES
    assert len(SNIPPETS) >= 3


@pytest.mark.parametrize("name", NAMES)
def test_named_objects_exist(name):
    assert callable(resolve(name))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One for all snippets, in their order: the later ones use the run that an earlier one trains."""
    return tmp_path_factory.mktemp("readme")


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: f"{len(snippet.splitlines())}-lines")
def test_snippets_run_and_are_short(snippet, folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert len(snippet.splitlines()) < 20
    exec(compile(snippet, "README.md", "exec"), {"__name__": "readme"})


def test_documented_commands_exist(capsys):
    from cmamba_jax.cli import main

    main(["--help"])
    usage = capsys.readouterr().out
    for command in set(re.findall(r"`cmamba (\w+)", README)):
        assert re.search(rf"^  {command} ", usage, flags=re.MULTILINE), command
