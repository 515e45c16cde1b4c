"""A run that is killed at any moment, in the middle of a save too, resumes to the same final parameters."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny

from cmamba_jax.train import load_run
from cmamba_jax.train.state import split_model

KILLS = int(os.environ.get("CMAMBA_TEST_KILLS", "2"))
"""How often the run is killed; CONTRIBUTING.md names the variable."""
EPOCHS = 20 * KILLS


@pytest.fixture
def start(tmp_path):
    """Starts `cmamba train` with a checkpoint every epoch."""
    source = f"from cmamba_jax.config import *\n\ndef config():\n    return {tiny.TINY!r}\n"
    (tmp_path / "tiny.py").write_text(source)
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def start(run, *words):
        command = [sys.executable, "-m", "cmamba_jax", "train", tmp_path / "tiny.py", "--train.epochs", str(EPOCHS)]
        return subprocess.Popen(
            [*command, "--run-dir", tmp_path / run, *words],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    return start


def finished(process):
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error


def wait(process, condition):
    """Returns as soon as the condition holds or the process has ended."""
    while process.poll() is None and not condition():
        time.sleep(0.0005)


def steps(folder: pathlib.Path) -> int:
    """The newest step that is saved whole."""
    return max((int(p.name) for p in folder.glob("checkpoints/last/*") if p.name.isdigit()), default=0)


def unfinished(folder: pathlib.Path) -> bool:
    """Whether a checkpoint is being written, or was when the run was killed."""
    return any("orbax-checkpoint-tmp" in p.name for p in folder.glob("checkpoints/*/*"))


def test_a_run_killed_again_and_again_ends_as_an_uninterrupted_one(start, tmp_path):
    rng = random.Random(0)
    folder, kills, during_saves = tmp_path / "killed", 0, 0
    process = start("killed")
    while kills < KILLS:
        before = steps(folder)
        wait(process, lambda: steps(folder) > before)  # noqa: B023 (called at once)
        # Every other time as a checkpoint is being written, otherwise anywhere within some epochs.
        if kills % 2 == 0:
            wait(process, lambda: unfinished(folder))
        else:
            time.sleep(0.3 * rng.random())
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            pytest.fail(f"the run ended before kill {kills + 1} of {KILLS}: give it more epochs")
        process.communicate()
        during_saves += unfinished(folder)
        kills += 1
        saved = steps(folder)
        assert saved > before  # At most what came since the last save is lost.
        process = start("killed", "--resume")
    finished(process)
    assert during_saves > 0
    whole = start("whole")
    finished(whole)
    for which in ("best", "last"):
        killed, whole = (split_model(load_run(tmp_path / run, which=which).model)[1] for run in ("killed", "whole"))
        jax.tree.map(np.testing.assert_array_equal, killed, whole)
    assert (folder / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
