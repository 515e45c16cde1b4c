import dataclasses
import json
import math

import jax
import numpy as np
import pytest
import tiny

from cmamba_jax.bench import efficiency
from cmamba_jax.errors import UserError

TINY = efficiency.Options(lengths=(4, 300), batch=1, d_model=8, d_state=2, n_layers=1, dtype="float32", repeats=1)


def test_both_models_have_as_many_parameters_and_differ_in_the_coupling_alone():
    coupled, attention = efficiency.models(efficiency.Options(), "float32").values()
    assert (coupled.coupling, attention.coupling) == ("shared", "cross_attention")
    assert (coupled.d_model, coupled.expand, coupled.d_state, coupled.n_layers) == (128, 2, 64, 3)
    sized = {"coupling": "shared", "d_model": coupled.d_model, "n_heads": coupled.n_heads, "expand": coupled.expand}
    assert dataclasses.replace(attention, **sized) == coupled


def test_memory_of_attention_grows_with_the_square_and_of_the_coupled_model_at_most_evenly():
    sizes = {}
    for name, config in efficiency.models(TINY, "float32").items():
        for length in (512, 2048):
            sizes[name, length] = efficiency._program_bytes(efficiency.prepare(config, "inference", 1, length)[0])
    assert sizes["cross_attention", 2048] / sizes["cross_attention", 512] > 10
    assert sizes["coupled", 2048] / sizes["coupled", 512] < 4.5


def test_a_command_measures_in_processes_of_its_own_and_writes_its_files(tmp_path, capsys):
    """The memory allowed is between what the two models need for 300 steps."""
    words = [
        "--kinds",
        "inference",
        *("--lengths", "300", "4", "--batch", "1", "--d-model", "8", "--d-state", "2", "--n-layers", "1"),
    ]
    words += ["--repeats", "1", "--memory", "0.005", "--output", str(tmp_path)]
    efficiency.main(words)
    text = capsys.readouterr().out
    report = json.loads((tmp_path / "efficiency.json").read_text())
    assert report["kind"] == "efficiency" and report["command"].split("' ")[-1].startswith(
        "cmamba bench efficiency --kinds inference --len"
    )
    assert report["batch"] == 1 and report["dtype"] == "float32" and report["memory_limit_bytes"] == 0.005 * 2**30
    small, large = report["results"]
    assert (small["length"], large["length"]) == (4, 300)
    for record in (small, large):
        own, other = (record["inference"][name] for name in efficiency.MODELS)
        assert own["ms"] > 0 and own["memory_bytes"] > 0
    assert other["error"] == "out of memory" and "ms" not in other
    assert other["memory_bytes"] > report["memory_limit_bytes"] > own["memory_bytes"]
    assert "out of memory" in text and "memory by the compiler" in text
    assert (tmp_path / "efficiency.png").stat().st_size > 1000


def test_the_training_step_trains():
    with tiny.quick_compilation():
        config = dataclasses.replace(efficiency.models(TINY, "float32")["coupled"], scan="reference")
        compiled, draw = efficiency.prepare(config, "training", 1, 4)
        before, batch = draw()
        old = jax.tree.map(np.asarray, before.params)
        after, metrics = compiled(before, batch)
        assert after.step == 1 and np.isfinite(metrics.loss)
        assert any((a != b).any() for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(after.params), strict=True))
        assert efficiency._median_ms(compiled, (after, batch), 2) > 0  # Donated states are passed on.


class Script:
    """Stands for the processes that measure: each is told its lengths, and answers from a list."""

    def __init__(self, *answers):
        self.answers, self.started = list(answers), []

    def __call__(self, options, words, kind, name, lengths, timed):
        self.started.append((kind, name, lengths, timed))
        return self

    def __enter__(self):
        self.answers.insert(0, {"device": "d"})
        return lambda: dict(self.answers.pop(0))

    def __exit__(self, *_):
        pass


def test_after_a_length_that_is_too_slow_memory_alone_is_asked_for(monkeypatch):
    ready, done, slow = {"memory_bytes": 5, "prepared": True}, {"ms": 1.0}, {"error": "too slow"}
    script = Script(ready, done, ready, slow, ready, ready)
    monkeypatch.setattr(efficiency, "_process", script)
    monkeypatch.setattr(efficiency, "MODELS", ("coupled",))
    report = efficiency.measure(efficiency.Options(lengths=(1, 2, 3, 4), kinds=("training",)))
    assert script.started == [
        ("training", "coupled", [1, 2, 3, 4], True),
        ("training", "coupled", [3, 4], False),
    ]
    found = [record["training"]["coupled"] for record in report["results"]]
    assert found[0] == {"memory_bytes": 5, "ms": 1.0}
    assert found[1] == {"memory_bytes": 5, "error": "too slow"}
    assert found[2] == found[3] == {"memory_bytes": 5, "error": "not tried"}


def test_the_device_counts_before_the_compiler_and_shares_need_both_figures():
    assert efficiency.memory_of({"memory_bytes": 3, "peak_bytes": 7}) == 7
    assert efficiency.memory_of({"memory_bytes": 3, "peak_bytes": None}) == 3
    assert efficiency.less({"ms": 2.05}, {"ms": 12.61}, "ms") == pytest.approx(0.837, abs=1e-3)  # The paper's 83.7%.
    assert math.isnan(efficiency.less({"ms": 1.0}, {"error": "out of memory"}, "ms"))


@pytest.mark.parametrize("words", [["--lengths", "0"], ["--repeats", "0"], ["--limit", "0"], ["--batch", "-1"]])
def test_sizes_that_are_not_positive_are_refused(words):
    with pytest.raises(UserError, match="have to be positive"):
        efficiency.main(words)
