import json
import pathlib

import pytest

from cmamba_jax.bench import seeds
from cmamba_jax.errors import UserError


def test_ratio_and_record(monkeypatch, capsys):
    commands = []

    def seconds(command):
        commands.append(command[command.index("train") :])
        return 3.0 if "--seeds" in command else 2.0

    monkeypatch.setattr(seeds, "_seconds", seconds)
    seeds.main(["--config", "a.py", "--seeds", "1", "2", "3", "--epochs", "4"])
    assert "one after another 6.0 s, together 3.0 s: 2.00 times" in capsys.readouterr().out
    assert [c[:4] for c in commands] == [["train", "a.py", "--train.epochs", "4"]] * 4
    assert [c[6:] for c in commands] == [["--seeds", "1", "2", "3"], *(["--train.seed", s] for s in "123")]
    assert json.loads(pathlib.Path("runs/bench/seeds.json").read_text())["ratio"] == 2


def test_a_failed_run_says_why(tmp_path):
    with pytest.raises(UserError, match="failed: .*no such file"):
        seeds.measure(seeds.Options(config=tmp_path / "none.py"))
