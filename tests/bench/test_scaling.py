import json

import pytest

from cmamba_jax.bench import scaling
from cmamba_jax.errors import UserError

TINY = [
    *("--d-model", "4", "--d-state", "2", "--n-layers", "1", "--length", "16", "--batch", "2"),
    *("--steps", "1", "--dtype", "float32", "--devices", "1", "2"),
]


def run(capsys, *words):
    scaling.main([*TINY, *words])
    return capsys.readouterr().out


def test_records_of_both_cases(capsys):
    result = json.loads(run(capsys, "--json"))
    mosei, long = result["cases"]
    assert (mosei["axis"], long["axis"]) == ("data", "sequence")
    for case in (mosei, long):
        one, two = case["results"]["1"], case["results"]["2"]
        assert one["sent_bytes"] == 0 and one["efficiency"] == 1 and two["sent_bytes"] > 0
        assert two["steps_per_second"] > 0 and two["memory_bytes"] > 0
        assert [p["devices"] for p in case["prediction"]] == [2**i for i in range(9)]
        assert case["prediction"][0]["samples_per_second"] == pytest.approx(one["samples_per_second"])
    # As many samples a device, or one batch shared out.
    two = mosei["results"]["2"]
    assert two["samples_per_second"] == pytest.approx(4 * two["steps_per_second"])
    assert long["results"]["2"]["samples_per_second"] == pytest.approx(2 * long["results"]["2"]["steps_per_second"])
    assert set(mosei["results"]["2"]["collectives"]) == {"all-reduce"}
    assert "collective-permute" in long["results"]["2"]["collectives"]


def test_the_prediction_counts_bytes_and_latency():
    one_second = {"steps_per_second": 1.0}
    options = scaling.Options(bandwidth=1.0, network=0.5, host=4, latency=0.0)
    reduce = scaling.Collective("all-reduce", 10**9, 2)
    curve = scaling._predict(options, "data", {1: one_second, 2: one_second}, [reduce], 2, batch=3)
    # Rings send 2 (n - 1) / n of the gradient: 1 s for two devices, 1.5 s for four, 3.5 s for eight at half the speed.
    assert [round(p["efficiency"], 6) for p in curve[:4]] == [1, 1 / 2, 0.4, round(1 / 4.5, 6)]
    assert curve[1]["samples_per_second"] == pytest.approx(3)


def test_table_and_replicas(capsys):
    text = run(capsys, "--cases", "mosei", "--axis", "pmap")
    assert "mosei: axis pmap, 2 samples a device, 16 steps" in text and "predicted, not measured" in text


def test_a_length_that_does_not_divide_is_refused(capsys):
    with pytest.raises(UserError, match="length 15 is no multiple of 2 devices"):
        run(capsys, "--cases", "long", "--length", "15")
