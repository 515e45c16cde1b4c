import json

import pytest

from cmamba_jax.bench import conv, timing
from cmamba_jax.results import readme, records
from pallas_kernels.coupled_scan.cases import Case


def test_times_and_their_share_of_the_bytes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(conv, "BENCHMARKS", {"tiny": Case(M=2, B=1, L=6, D=4, N=4, dtype="bfloat16")})
    monkeypatch.setattr(timing, "copy_bandwidth", lambda: 1e9)
    conv.main(["--shapes", "tiny", "--repeats", "1", "--output", str(tmp_path), "--json"])
    record = json.loads(capsys.readouterr().out)
    (result,) = record["results"]
    for kind, arrays in (("forward", 2), ("forward_backward", 5)):
        assert result[kind]["share"] == pytest.approx(1e3 * arrays * 2 * 6 * 4 * 2 / 1e9 / result[kind]["ms"])
    conv.main(["--shapes", "tiny", "--repeats", "1", "--output", str(tmp_path)])
    assert "tiny" in capsys.readouterr().out
    (path,) = records.collect(tmp_path, tmp_path / "results")
    table, count = readme.render([json.loads(path.read_text())], "<!-- results: conv -->\n<!-- end -->")
    assert count == 1 and "| tiny (1, 6, 4) | xla |" in table


def test_copies_are_measured():
    assert timing.copy_bandwidth(2**10) > 0
