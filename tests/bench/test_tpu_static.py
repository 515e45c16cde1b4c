"""The reader of the compiler's dumps, on a made-up dump; the real ones are read in test_mosaic_tpu_aot.py."""

import json

import jax
import pytest

from cmamba_jax.bench import tpu_compile, tpu_static
from cmamba_jax.errors import UserError
from pallas_kernels.coupled_scan.cases import covering_cases, make_inputs

SCHEDULE = """\
LB: loop body
     0   :  { %1 = vsyncpa }
   0x1 LB: > { %2 = vld }
   0x2 LB: >> { %3 = vadd }
   0x3   : >> { %4 = vmul }
   0x4   : > { %5 = vst }
   0x5   : >> { %6 = sbr.rel }
   0x6   : > { %7 = vst }
   0x7   : > { %8 = vst }
   0x8   : > { %9 = sbr.rel }
   0x9   :  { %10 = vst }
"""
SLOTS = """\
== CAPACTIY:
MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
    4     3     4     2     1     3     3     1     1     2
== UTILIZATION:
""" + "".join(f"0 0 {vector} 0 1 0 0 0 {vector % 2} 0\n" for vector in range(10))


def _write(folder, schedule=SCHEDULE):
    (folder / "7-plain_loop.1-72-final_bundles.txt").write_text(schedule)
    (folder / "7-plain_loop.1-71-schedule-analysis_final_bundles.txt").write_text("")
    (folder / "7-plain_loop.1-70-final_hlo-static-per-bundle-utilization.txt").write_text(SLOTS)


def test_reads_the_innermost_loop_and_its_slots(tmp_path):
    _write(tmp_path)
    schedule = tpu_static.read_schedule(tmp_path, "plain_loop")
    assert (schedule.bundles, schedule.vector_slots) == (10, 4)
    # Bundles 2 to 5; number 4 was moved in from the loop around.
    assert schedule.loops == {"walk": tpu_static.Loop(bundles=4, vector=2 + 3 + 4 + 5, exp=4, spills=2)}


def test_an_unknown_loop_structure_is_an_error(tmp_path):
    _write(tmp_path, SCHEDULE.replace("0x7   : >", "0x7 LB: >>"))
    with pytest.raises(UserError, match="expected the loops walk in plain_loop, found 2 loops"):
        tpu_static.read_schedule(tmp_path, "plain_loop")
    with pytest.raises(
        UserError, match="expected one schedule of coupled_scan_forward in the compiler's dump, found 0"
    ):
        tpu_static.read_schedule(tmp_path, "coupled_scan_forward")


def test_without_libtpu_one_line_says_so(monkeypatch):
    monkeypatch.setattr(tpu_compile, "available", lambda: False)
    with pytest.raises(UserError, match=r"libtpu is not installed.*pip install 'jax\[tpu\]'"):
        tpu_static.main([])


def test_table_and_json(monkeypatch, capsys):
    record = {"bundles_per_step": 18.375, "vector_floor": 14.0, "exp_floor": 6.0, "predicted_ms": 4.1, "memory_ms": 1.0}
    report = {
        "libtpu": "0.1",
        "chip": "v6e",
        "case": "S2",
        "results": [{"name": "forward"} | record, {"name": "xla", "bundles_per_step": 600.0}],
    }
    monkeypatch.setattr(tpu_static, "measure", lambda case, chip: report)
    tpu_static.main(["--chip", "v6e"])
    lines = capsys.readouterr().out.splitlines()
    assert "v6e, S2" in lines[0] and "nothing here ran on a TPU" in lines[1]
    assert lines[-2].split() == ["forward", "18.38", "14.00", "6.00", "4.10", "1.00"]
    assert lines[-1].split() == ["xla", "600.00", "-", "-", "-", "-"]
    tpu_static.main(["--chip", "v6e", "--json"])
    record = json.loads(capsys.readouterr().out)
    assert record.items() >= report.items() and record["kind"] == "tpu_static"


@pytest.mark.parametrize("case", covering_cases()[-3:], ids=str)
def test_abstract_inputs_are_those_of_the_cases(case):
    actual, expected = tpu_compile.abstract_inputs(case), make_inputs(case)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
