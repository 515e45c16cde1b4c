import pytest


@pytest.fixture(autouse=True)
def _records_go_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
