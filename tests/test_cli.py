import io
import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny

from cmamba_jax import cli
from cmamba_jax.data import load
from cmamba_jax.train import checkpoint, load_run, runs
from cmamba_jax.train.state import split_model

SOURCE = f"""
from cmamba_jax.config import *

def config():
    return {tiny.TINY!r}
"""


@pytest.fixture(autouse=True)
def _quick_compilation():
    with tiny.quick_compilation():
        yield


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(SOURCE)
    return path


@pytest.fixture
def tiny_run():
    return tiny.run()


@pytest.fixture
def call(capfd):
    """Runs a command in this process: exit code, stdout, stderr."""

    def call(*words):
        capfd.readouterr()
        try:
            cli.main([str(word) for word in words])
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code or 0, *capfd.readouterr()

    return call


@pytest.fixture
def fails(call):
    """Runs a command that has to fail like a user's mistake, and returns its one message."""

    def fails(*words):
        code, out, err = call(*words)
        assert code == 2 and out == "" and "Traceback" not in err
        assert err.startswith("cmamba: error: ") and err.count("\n") == 1, err
        return err

    return fails


def test_train_info_and_overrides(call, config_file, tmp_path):
    code, out, err = call(
        "train",
        config_file,
        "--train.epochs",
        1,
        "--model.d-state=3",
        "--run-dir",
        tmp_path / "mine",
        "--train.log-every",
        1,
    )
    assert code == 0 and err == ""
    assert out.startswith("epoch 1/1  train loss")
    assert out.endswith(f"report: {tmp_path}/mine/report/index.html\n") and "\ntest: loss " in out
    config = runs.read_config(tmp_path / "mine")
    assert (config.train.epochs, config.model.d_state, config.train.run_dir) == (1, 3, str(tmp_path / "mine"))
    code, out, err = call("info", config_file, "--model.d-state", 3)
    assert code == 0 and err == "" and json.loads(out)["config"]["model"]["d_state"] == 3


KILLER = """
import os, signal, threading
from cmamba_jax.train import checkpoint, writers

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def wrap(cls, name, after):
    original = getattr(cls, name)
    def wrapped(self, *args, **kwargs):
        after(lambda: original(self, *args, **kwargs), *args)
    setattr(cls, name, wrapped)

def write(original, step, epoch, split, values):
    original()
    if os.environ["DIE_AT"] == f"{split} {step}":
        die()
    if os.environ["DIE_AT"] == f"terminated at {split} {step}":
        os.kill(os.getpid(), signal.SIGTERM)

def save(original, name, state, position):
    if os.environ["DIE_AT"] == f"save {name} {position.step}":
        threading.Timer(0.02, die).start()
        original()
        die()
    original()

wrap(writers.MetricWriter, "write", write)
wrap(checkpoint.Checkpoints, "save", save)
"""


def test_a_killed_run_resumes_to_the_same_bytes(config_file, tmp_path):
    """SIGKILL between a validation and its checkpoint, SIGTERM within an epoch, SIGKILL during a save."""
    config_file.write_text(KILLER + SOURCE)
    command = [sys.executable, "-m", "cmamba_jax", "train", config_file, "--train.epochs", "6"]

    def train(run, *words, die_at=""):
        environment = os.environ | {
            "DIE_AT": die_at,
            "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        done = subprocess.run(
            [*command, "--run-dir", tmp_path / run, *words], env=environment, capture_output=True, text=True
        )
        told = die_at.startswith("terminated")
        assert done.returncode == (75 if told else -signal.SIGKILL if die_at else 0), done.stderr
        assert done.stderr == ("cmamba: told to stop (SIGTERM): saved at step 11; the same command with --resume "
                               "continues\n" if told else "")  # fmt: skip

    train("killed", die_at="valid 9")
    assert checkpoint.exists(tmp_path / "killed" / "checkpoints")
    train("killed", "--resume", die_at="terminated at train 10")
    train("killed", "--resume", die_at="save last 15")
    train("killed", "--resume")
    train("whole")

    assert (tmp_path / "killed/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    for which in ("best", "last"):
        killed, whole = (split_model(load_run(tmp_path / run, which=which).model)[1] for run in ("killed", "whole"))
        jax.tree.map(np.testing.assert_array_equal, killed, whole)
    killed, whole = (json.loads((tmp_path / run / "report/metrics.json").read_text()) for run in ("killed", "whole"))
    assert killed == whole
    assert not list((tmp_path / "killed").rglob("*.orbax-checkpoint-tmp*"))


def test_eval_prints_the_metrics_of_the_run(call, tiny_run):
    code, out, err = call("eval", tiny_run.run_dir)
    expected = "  ".join(f"{name} {value:.4f}" for name, value in tiny_run.metrics["test"].items())
    assert (code, out, err) == (0, f"test: {expected}\n", "")
    assert call("eval", tiny_run.run_dir, "--split", "valid", "--checkpoint", "last")[1].startswith("valid: loss ")
    missing = ("--missing.kind", "step", "--missing.rate", "0.7")
    first = call("eval", tiny_run.run_dir, *missing)
    assert first[0] == 0 and first[1] != out and first == call("eval", tiny_run.run_dir, *missing)


def test_predict_writes_csv_and_jsonl(call, tiny_run, tmp_path):
    (tmp_path / "new").mkdir()
    for i, sample in enumerate(list(load(tiny.TINY.data).test)[:3]):
        np.savez(tmp_path / "new" / f"{i}.npz", **sample["inputs"])
    code, out, err = call("predict", tiny_run.run_dir, tmp_path / "new")
    assert code == 0 and err == ""
    assert out.splitlines()[0] == "id,label,0,1" and len(out.splitlines()) == 4
    assert call("predict", tiny_run.run_dir, tmp_path / "new", "--output", tmp_path / "p.csv") == (0, "", "")
    assert (tmp_path / "p.csv").read_text() == out
    call("predict", tiny_run.run_dir, tmp_path / "new", "--output", tmp_path / "p.jsonl")
    records = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [r["id"] for r in records] == ["0.npz", "1.npz", "2.npz"]
    np.testing.assert_allclose(np.sum([r["outputs"] for r in records], axis=1), 1, rtol=1e-5)


def test_crossval_prints_a_table(call, config_file, monkeypatch, tmp_path):
    from cmamba_jax.train import crossval

    folds = [{"loss": 0.5, "accuracy": 0.8}, {"loss": 0.3, "accuracy": 0.9}]
    result = crossval.CrossValidation(
        tmp_path / "crossval.json", folds, {"loss": 0.4, "accuracy": 0.85}, {"loss": 0.1414, "accuracy": 0.0707}
    )
    monkeypatch.setattr(crossval, "cross_validate", lambda config, command: result)
    _, out, _ = call("crossval", config_file)
    assert out.splitlines() == [
        "           fold 0   fold 1     mean      std",
        "loss       0.5000   0.3000   0.4000   0.1414",
        "accuracy   0.8000   0.9000   0.8500   0.0707",
        f"written to {tmp_path}/crossval.json",
    ]


def test_help(call, config_file):
    for words in ([], ["--help"], ["train", "--help"]):
        code, out, err = call(*words)
        assert code == 0 and out.startswith("usage: cmamba COMMAND") and err == ""
    code, out, _ = call("train", config_file, "--help")
    assert code == 0 and "--model.d-state INT" in out and "State size N of each channel. (default: 2)" in out
    assert "--train.resume" in out and "--data.length INT" in out
    code, out, _ = call("predict", "--help")
    assert code == 0 and "RUN_DIR" in out and ".jsonl" in out


def test_unknown_commands(fails):
    assert "unknown command 'trian'" in (message := fails("trian")) and "did you mean 'train'?" in message
    assert "needs a CONFIG first" in fails("train")
    assert "expected one of scan, conv, efficiency, step, seeds, scaling, stream, tpu-static, got 'skan'" in fails(
        "bench", "skan"
    )


CONFIG_MISTAKES = {
    "misspelt field": ("d_state=", "d_sate=", "did you mean 'd_state'?"),
    "misspelt choice": ("coupling='shared'", "coupling='sharde'", "did you mean 'shared'?"),
    "wrong type": ("d_model=4", "d_model='4'", "model.d_model has to be of type int, got '4'"),
    "out of range": ("batch_size=8", "batch_size=0", "pipeline.batch_size has to be >= 1, got 0"),
    "syntax": ("def config():", "def config(:", "line 4: SyntaxError"),
    "undefined name": ("return ", "return nothing or ", "line 5: NameError: name 'nothing' is not defined"),
    "missing import": (
        "from cmamba_jax.config",
        "import absent\nfrom cmamba_jax.config",
        "line 2: ModuleNotFoundError",
    ),
    "no function": ("def config", "def conf", "has no function config()"),
    "no return": ("return ", "", "config() returned NoneType, expected an ExperimentConfig"),
    "no data": ("data=Synthetic", "data=None and Synthetic", "config.data is None"),
}


@pytest.mark.parametrize(("old", "new", "message"), CONFIG_MISTAKES.values(), ids=CONFIG_MISTAKES)
def test_mistakes_in_a_configuration_file(fails, config_file, old, new, message):
    config_file.write_text(SOURCE.replace(old, new))
    assert message in fails("train", config_file)


def test_a_configuration_file_that_is_absent(fails, tmp_path):
    assert "no such file; expected a Python file with config()" in fails("train", tmp_path / "absent.py")


@pytest.mark.parametrize(("words", "message"), [
    (["--model.d-stat", "3"], "--model.d-state"),
    (["--model.coupling", "sharde"], "'shared'"),
    (["--model.d-state", "many"], "invalid literal for int"),
])  # fmt: skip
def test_mistakes_in_overrides(call, config_file, words, message):
    code, out, err = call("train", config_file, *words)
    assert code == 2 and out == "" and message in err and "Traceback" not in err


def test_mistakes_that_show_when_the_experiment_is_built(fails, config_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "unknown metric 'acc'; expected one of loss, accuracy" in fails(
        "train", config_file, "--train.monitor", "acc"
    )
    assert "unknown scan implementation 'fast'" in fails("train", config_file, "--model.scan", "fast")
    assert "model.d_model has to be >= 1" in fails("train", config_file, "--model.d-model", 0)
    assert "change data.length" in fails("info", config_file, "--data.length", 1)
    assert "no run to resume" in fails("train", config_file, "--resume")
    assert "has no folds" in fails("crossval", config_file)
    assert {p.name for p in tmp_path.iterdir()} == {"tiny.py"}


def test_wrong_folders_and_inputs(fails, tiny_run, tmp_path):
    assert "expected the folder of a run" in fails("eval", tmp_path)
    assert "missing.kind is none" in fails("eval", tiny_run.run_dir, "--missing.rate", "0.5")
    assert "expected an .npz file or a folder" in fails("predict", tiny_run.run_dir, tmp_path)
    assert "ends in .csv or .jsonl" in fails("predict", tiny_run.run_dir, tmp_path, "--output", "p.xlsx")
    np.savez(tmp_path / "bad.npz", cue=np.ones((8, 1)), symbols=np.full((8, 2), np.nan))
    assert "modality 'symbols' holds nan at step 0" in fails("predict", tiny_run.run_dir, tmp_path)
    np.savez(tmp_path / "bad.npz", cue=np.ones((8, 1)), symbols=np.ones((8, 5)))
    assert "has shape [8, 5], expected [L, 2]" in fails("predict", tiny_run.run_dir, tmp_path)


def test_a_damaged_checkpoint(fails, tiny_run, tmp_path, config_file):
    run_dir = tmp_path / "damaged"
    shutil.copytree(tiny_run.run_dir, run_dir)
    for name in ("best", "last"):
        for folder in (run_dir / "checkpoints" / name).iterdir():
            for file in (folder / "params" / "d").iterdir():
                file.write_bytes(b"")
    message = fails("eval", run_dir)
    assert "is damaged or incomplete" in message and message.endswith(
        "use the last checkpoint (--checkpoint last), or train again\n"
    )
    message = fails("train", config_file, "--resume", "--run-dir", run_dir)
    assert "is damaged or incomplete" in message and "to resume from the one before it, step 6" in message


def test_a_diverging_run_says_where(fails, config_file, tmp_path):
    message = fails("train", config_file, "--train.output", tmp_path, "--optimizer.learning-rate", "1e30")
    assert "training stopped at step" in message and "lower optimizer.learning_rate" in message


def test_an_unexpected_error_keeps_its_traceback(config_file, monkeypatch):
    def broken(config):
        raise ValueError("a fault of ours")

    monkeypatch.setattr("cmamba_jax.train.experiment.fit", broken)
    with pytest.raises(ValueError, match="a fault of ours"):
        cli.main(["train", str(config_file)])


def test_interrupt_is_no_traceback(call, config_file, monkeypatch):
    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr("cmamba_jax.train.experiment.fit", interrupted)
    code, _, err = call("train", config_file)
    assert code == 130 and "--resume continues" in err


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "cmamba_jax", "trian"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("cmamba: error: unknown command 'trian'")


def test_sweep_and_results(call, fails, config_file, tmp_path, monkeypatch):
    """A grid of one row on an experiment's file, its table, and the list of what was not run."""
    monkeypatch.chdir(tmp_path)
    train = ("--train.epochs", 1, "--train.output", "runs", "--seeds", 1, 2)
    code, out, err = call("sweep", config_file, "--grid", "model.coupling=full", *train)
    assert (code, err) == (0, "")
    assert out.startswith("row 1/1: coupling full (") and "\n| coupling full |" in out
    assert out.endswith("written to runs/tiny_sweep/table.md and table.csv\n")
    (tmp_path / "configs").mkdir()
    shutil.copy(config_file, tmp_path / "configs")
    (tmp_path / "configs" / "other.py").write_text(
        SOURCE.replace("'tiny'", "'other'").replace("paper=''", "paper='81.8'")
    )
    (tmp_path / "README.md").write_text("<!-- results: experiments -->\n<!-- end -->\n")
    lines = call("results")[1].splitlines()
    assert lines[0] == "results: 1 records, 1 of them from runs"
    assert lines[1:] == ["RESULTS.md: 1 tables, 1 configurations not run", "README.md: 1 tables"]
    assert "| tiny_sweep | loss: coupling full " in (tmp_path / "README.md").read_text()
    text = (tmp_path / "RESULTS.md").read_text()
    assert f"cmamba sweep {config_file} --grid model.coupling=full --train.epochs 1 " in text
    assert "| coupling full |" in text and "| `configs/other.py` | 81.8 |" in text
    assert "has no rows: give fields to vary" in fails("sweep", config_file)
    assert "--grid: expected FIELD=VALUE,VALUE" in fails("sweep", config_file, "--grid", "model.d_state")


def test_a_sweep_is_not_an_experiment(fails, tmp_path):
    path = tmp_path / "table.py"
    path.write_text("from cmamba_jax.config import *\n\ndef config():\n    return SweepConfig()\n")
    assert "returned SweepConfig, expected an ExperimentConfig; run it with `cmamba sweep`" in fails("train", path)


def test_stream_answers_goes_on_and_survives_nonsense(call, tiny_run, tmp_path, monkeypatch):
    sample = next(iter(load(tiny.TINY.data).test))["inputs"]
    lines = [json.dumps({m: values[t].tolist() for m, values in sample.items()}) for t in range(8)]

    def stream(lines, *words):
        text = "".join(line + "\n" for line in lines)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        code, out, err = call("stream", tiny_run.run_dir, *words)
        assert code == 0 and err == ""
        return [json.loads(line) for line in out.splitlines()]

    whole = stream([lines[0], "nonsense", *lines[1:]])
    assert "error" in whole.pop(1) and [r["time"] for r in whole] == list(range(8))
    state = ["--state", tmp_path / "state.npz"]
    assert stream(lines[:3], *state) + stream(lines[3:], *state) == whole
    expected = load_run(tiny_run.run_dir).predict({m: values[None] for m, values in sample.items()})[0].outputs
    np.testing.assert_allclose(list(whole[-1]["outputs"].values()), expected, rtol=1e-4)


def test_stream_mistakes(fails, tiny_run, tmp_path):
    assert "leave --port or --state out" in fails(
        "stream", tiny_run.run_dir, "--port", 0, "--state", tmp_path / "s.npz"
    )
    assert "expected at least 1 stream and a delay >= 0" in fails("stream", tiny_run.run_dir, "--max-delay", -1)


def test_export_writes_what_the_other_commands_read(call, fails, tiny_run, tmp_path):
    code, out, err = call("export", tiny_run.run_dir, tmp_path / "model")
    assert (code, out, err) == (0, f"written to {tmp_path}/model\n", "")
    assert {p.name for p in (tmp_path / "model").iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert call("eval", tmp_path / "model")[1] == call("eval", tiny_run.run_dir)[1]
    with tiny.symbolic_sizes():
        code, _, err = call("export", tmp_path / "model", tmp_path / "artefact", "--format", "stablehlo", "--length", 8)
    assert code == 0 and err == "" and (tmp_path / "artefact/model.stablehlo").stat().st_size > 1000
    assert "--format stablehlo, which needs it" in fails("export", tiny_run.run_dir, tmp_path, "--format", "stablehlo")


def test_explain_draws_a_picture(call, fails, tiny_run, tmp_path):
    code, out, err = call("explain", tiny_run.run_dir, "test:0", "--output", tmp_path / "e.png", "--target", "1")
    assert code == 0 and err == "" and out.startswith("1: logit ") and "contributions: cue " in out
    assert (tmp_path / "e.png").read_bytes().startswith(b"\x89PNG")
    values = json.loads((tmp_path / "e.json").read_text())
    assert values["modalities"] == ["cue", "symbols"] and np.shape(values["attribution"]) == (2, 8)
    assert "ends in .png" in fails("explain", tiny_run.run_dir, "test:0", "--output", tmp_path / "e.pdf")
    assert "expected an .npz file" in fails("explain", tiny_run.run_dir, tmp_path / "absent.npz")
