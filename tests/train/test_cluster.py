"""Two processes on one machine (gloo) train as one does."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny

from cmamba_jax.config import ParallelConfig
from cmamba_jax.data import Pipeline, load
from cmamba_jax.errors import UserError
from cmamba_jax.train import cluster
from cmamba_jax.train.parallel import Feed
from cmamba_jax.train.writers import read_history

# A batch size that does not divide the samples: the last batch of an epoch has filler rows.
EXPERIMENT = dataclasses.replace(
    tiny.TINY,
    data=dataclasses.replace(tiny.TINY.data, n_train=27),
    model=dataclasses.replace(tiny.TINY.model, pooling="mean"),
)
SOURCE = f"""
import os
from cmamba_jax.config import *
from cmamba_jax.train import parallel

class Signalled(parallel.Feed):
    "A signal as the fourth batch is read, in one of the processes."
    seen = 0

    def __next__(self):
        self.seen += 1
        if self.seen == 4:
            os.kill(os.getpid(), int(os.environ["SIGNAL"]))
        return super().__next__()

if "SIGNAL" in os.environ:
    parallel.Feed = Signalled

def config():
    return {EXPERIMENT!r}
"""


@pytest.fixture
def start(tmp_path):
    """Starts `cmamba train` in a process that sees some simulated devices."""
    (tmp_path / "tiny.py").write_text(SOURCE)

    def start(*words, devices, **variables):
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
            "XLA_FLAGS": f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={devices}",
            **variables,
        }
        return subprocess.Popen(
            [sys.executable, "-m", "cmamba_jax", "train", tmp_path / "tiny.py", *words],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    return start


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_processes_train_as_one_and_what_stops_one_stops_both(start, tmp_path):
    spread = ["--parallel.data", "2", "--parallel.fsdp", "2", "--run-dir", str(tmp_path / "two")]

    def pair(number, *words):
        """Two processes, the second of which receives a signal: exit codes and what they wrote."""
        meet = ["--parallel.coordinator", f"127.0.0.1:{free_port()}", "--parallel.num-processes", "2"]
        meet += ["--parallel.heartbeat-seconds", "10", *spread, *words]
        both = [
            start(*meet, "--parallel.process-id", str(i), devices=2, **({"SIGNAL": str(int(number))} if i else {}))
            for i in range(2)
        ]
        outputs = [process.communicate(timeout=200) for process in both]
        return [process.returncode for process in both], outputs

    codes, outputs = pair(signal.SIGTERM)
    assert codes == [75, 75], outputs
    assert "told to stop (SIGTERM)" in outputs[0][1]
    assert ["epoch 1/3" in output for output, _ in outputs] == [True, False]  # one of them speaks

    # Alone, a process could not go on: it ends by itself, and says of what.
    codes, outputs = pair(signal.SIGKILL, "--resume")
    # Whichever notices first: our process by a failed collective, or JAX's service by a heartbeat that does not come.
    message = {2: "the processes of this run lost each other", -signal.SIGABRT: "indicates that another task died"}
    assert codes[1] == -signal.SIGKILL and message[codes[0]] in outputs[0][1], outputs

    # The rest on one process and other axes; the whole on one device.
    rest = start("--resume", "--run-dir", str(tmp_path / "two"), "--parallel.sequence", "2", devices=2)
    whole = start("--run-dir", str(tmp_path / "one"), devices=1)
    for process in (rest, whole):
        _, error = process.communicate(timeout=200)
        assert process.returncode == 0, error
    two, one = (read_history(tmp_path / run) for run in ("two", "one"))
    assert [(r["step"], r["split"]) for r in two] == [(r["step"], r["split"]) for r in one]
    for ours, theirs in zip(two, one, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    metrics = [json.loads((tmp_path / run / "report/metrics.json").read_text())["test"] for run in ("two", "one")]
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-5)


@pytest.mark.parametrize("batch_size", [2, 8])
def test_processes_share_out_an_epoch_without_loss_or_repetition(batch_size):
    splits = load(EXPERIMENT.data)
    pipeline = Pipeline(splits, dataclasses.replace(EXPERIMENT.pipeline, batch_size=batch_size), seed=0)
    half = batch_size // 2
    streams = [pipeline.train(rows) for rows in (None, slice(0, half), slice(half, batch_size))]
    for _ in range(2 * pipeline.steps_per_epoch):
        whole, first, second = (next(stream) for stream in streams)
        jax.tree.map(
            lambda all_rows, a, b: np.testing.assert_array_equal(all_rows, np.concatenate([a, b])), whole, first, second
        )


def test_the_place_in_the_data_is_that_of_the_iterator_inside():
    pipeline = Pipeline(load(EXPERIMENT.data), EXPERIMENT.pipeline, seed=0)
    feed = Feed(pipeline.train(), lambda batch: batch)
    next(feed)
    state, after = feed.get_state(), next(feed)
    again = Feed(pipeline.train(), lambda batch: batch)
    again.set_state(state)
    jax.tree.map(np.testing.assert_array_equal, next(again), after)


def test_clusters_are_detected_by_what_they_set(monkeypatch):
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    assert cluster.detected() is None
    for name, value, expected in (
        ("SLURM_STEP_NUM_TASKS", "4", "Slurm"),
        ("OMPI_COMM_WORLD_SIZE", "2", "Open MPI"),
        ("TPU_WORKER_HOSTNAMES", "a,b", "TPU pod"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert cluster.detected() == expected
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert cluster.detected() is None


def test_half_a_configuration_is_refused():
    with pytest.raises(
        UserError, match=r"parallel.coordinator is set, but parallel.num_processes, parallel.process_id"
    ):
        cluster.initialize(ParallelConfig(coordinator="127.0.0.1:1"))


def test_a_failed_collective_is_explained_where_there_are_others(monkeypatch):
    def fail():
        with cluster.explained():
            raise jax.errors.JaxRuntimeError("Connection closed by peer\nand more")

    with pytest.raises(jax.errors.JaxRuntimeError):
        fail()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match=r"lost each other \(Connection closed by peer\); .* with --resume"):
        fail()
