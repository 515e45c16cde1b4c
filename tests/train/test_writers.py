import json
import math
import time

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from cmamba_jax.errors import UserError
from cmamba_jax.train.writers import MetricWriter, Progress, read_history


def write_steps(run_dir, steps, *, start_step=0):
    writer = MetricWriter(run_dir, start_step=start_step)
    for step in steps:
        writer.write(step, step // 4, "train", {"loss": 1 / step}, timing={"samples_per_second": time.time()})
        if step % 4 == 0:
            writer.write(step, step // 4, "valid", {"loss": 2 / step, "accuracy": math.nan})
    writer.close()


def events(run_dir):
    """The events of all TensorBoard files of a run, oldest first."""
    found = []
    for path in (run_dir / "tensorboard").iterdir():
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            content, data = data[12 : 12 + length], data[16 + length :]
            found.append(event_pb2.Event.FromString(content))
    return sorted(found, key=lambda event: event.wall_time)


def scalars(run_dir):
    return [(v.tag, e.step, v.simple_value) for e in events(run_dir) for v in e.summary.value]


def test_records_come_back(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.write(1, 0, "train", {"loss": np.float32(0.5)})
    writer.write(2, 0, "valid", {"loss": 0.25, "auc": math.nan})
    writer.close()
    first, second = read_history(tmp_path)
    assert first == {"step": 1, "epoch": 0, "split": "train", "loss": 0.5}
    assert second["loss"] == 0.25 and math.isnan(second["auc"])


def test_lines_are_strict_json(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.write(1, 0, "train", {"loss": math.inf})
    writer.close()

    def reject(constant):
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=reject)["loss"] is None


def test_every_line_is_on_disk_at_once(tmp_path):
    writer = MetricWriter(tmp_path)
    for step in range(1, 4):
        writer.write(step, 0, "train", {"loss": 1.0})
        assert [record["step"] for record in read_history(tmp_path)] == list(range(1, step + 1))
    writer.close()


@pytest.mark.parametrize("kept_characters", [None, -1, -20], ids=["whole", "no newline", "half a line"])
def test_resumed_file_equals_uninterrupted_one(tmp_path, kept_characters):
    write_steps(tmp_path / "whole", range(1, 13))
    write_steps(tmp_path / "killed", range(1, 11))
    path = tmp_path / "killed" / "metrics.jsonl"
    path.write_text(path.read_text()[:kept_characters])
    write_steps(tmp_path / "killed", range(9, 13), start_step=8)
    assert path.read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_resuming_before_the_first_checkpoint_starts_afresh(tmp_path):
    write_steps(tmp_path, range(1, 4))
    write_steps(tmp_path, range(1, 3))
    assert [record["step"] for record in read_history(tmp_path)] == [1, 2]


def test_damage_in_the_middle_is_reported(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(UserError, match="metrics.jsonl is damaged"):
        read_history(tmp_path)


def test_history_of_a_run_without_records_is_empty(tmp_path):
    assert read_history(tmp_path) == []


def test_tensorboard_has_values_and_timing(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.write(3, 0, "train", {"loss": 0.5}, timing={"samples_per_second": 8.0})
    writer.close()
    assert scalars(tmp_path) == [("train/loss", 3, 0.5), ("train/samples_per_second", 3, 8.0)]
    assert "samples_per_second" not in (tmp_path / "metrics.jsonl").read_text()


def test_tensorboard_discards_later_steps_on_resume(tmp_path):
    write_steps(tmp_path, range(1, 6))
    write_steps(tmp_path, range(5, 7), start_step=4)
    marks = [e.step for e in events(tmp_path) if e.HasField("session_log")]
    assert marks[-1] == 5  # TensorBoard hides older events from this step on.


def test_reserved_names_are_refused(tmp_path):
    writer = MetricWriter(tmp_path)
    with pytest.raises(ValueError, match="'epoch'.*names of metrics"):
        writer.write(1, 0, "train", {"epoch": 1.0})
    writer.close()


def test_progress_shows_loss_and_throughput(capsys):
    progress = Progress(10, start_step=2, enabled=True)
    progress.update(6, 0.125, samples=256)
    progress.message("epoch 1 done")
    progress.update(10, 0.0625, samples=256)
    progress.close()
    out, err = capsys.readouterr()
    assert out.strip() == "epoch 1 done"
    assert "10/10" in err and "loss 0.0625" in err and "samples/s" in err


def test_disabled_progress_prints_messages_only(capsys):
    progress = Progress(10, enabled=False)
    progress.update(10, 0.5, samples=64)
    progress.message("done")
    progress.close()
    out, err = capsys.readouterr()
    assert out == "done\n" and err == ""
