import json
import pathlib

import numpy as np
import pytest

from cmamba_jax.bench import scan
from cmamba_jax.errors import UserError
from pallas_kernels import coupled_scan
from pallas_kernels.coupled_scan.cases import Case, make_inputs

TINY = ["--modalities", "2", "--batch", "1", "--length", "6", "--channels", "3", "--states", "4", "--repeats", "2"]
VARIANTS = ["plain", "reference", "xla", "xla:2"]


def test_json_holds_every_variant(capsys):
    scan.main([*TINY, "--variants", *VARIANTS, "--json"])
    result = json.loads(capsys.readouterr().out)
    assert {axis: result["case"][axis] for axis in "MBLDN"} == {"M": 2, "B": 1, "L": 6, "D": 3, "N": 4}
    assert result["repeats"] == 2 and result["device"].endswith("CPU") and "jax" in result["versions"]
    assert json.loads(pathlib.Path("runs/bench/scan.json").read_text()) == result
    assert [record["name"] for record in result["results"]] == VARIANTS
    for record in result["results"]:
        for kind in ("forward", "forward_backward"):
            assert record[f"{kind}_ms"] > 0
            assert record[f"{kind}_temp_bytes"] > 0


def test_table_has_a_row_for_each_variant(capsys):
    scan.main([*TINY, "--variants", "plain", "xla"])
    device, case, *rows = capsys.readouterr().out.splitlines()
    assert "CPU" in device and "jax" in device
    assert "shared" in case and "L 6" in case
    assert [row.split()[0] for row in rows[-2:]] == ["plain", "xla"]
    assert all(len(row.split()) == 5 for row in rows[-2:])


@pytest.mark.parametrize("coupling", ["independent", "shared", "full"])
def test_the_baseline_computes_the_same_scan(coupling):
    case = Case(M=3, B=2, L=7, D=3, N=4, coupling=coupling, skip=True, gate=True, dt_bias=True)
    inputs = make_inputs(case)
    actual, expected = scan.plain_scan(**inputs), coupled_scan(**inputs)
    np.testing.assert_allclose(actual.y, expected.y, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(actual.final_state, expected.final_state, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("variant", ["fast", "xla:many", "reference:4", "xla:0"])
def test_unknown_variant_names_the_known_ones(variant):
    with pytest.raises(UserError, match=f"unknown variant '{variant}'; known: plain, reference, xla.*, or xla:CHUNK"):
        scan.main([*TINY, "--variants", variant])
