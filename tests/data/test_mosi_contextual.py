"""The contextual CMU-MOSI files: rows become videos in the order of the utterances, and videos are never divided."""

import dataclasses

import numpy as np
import pytest
import real_data

from cmamba_jax import data
from cmamba_jax.config import MosiContextualConfig
from cmamba_jax.data.checks import DataError, checked

WIDTHS = {"text": 4, "audio": 3, "video": 2}
LENGTHS = {"train": [3, 2, 4, 1, 2, 3, 2, 2, 1, 3], "test": [2, 3, 1]}


@pytest.fixture
def config(tmp_path):
    """Files in the exact format; feature 0 of an utterance is its number, and the rows of a video are mixed up."""
    rng = np.random.default_rng(0)
    lines = ["split,row,video_id,utterance,label,transcript"]
    for split, lengths in LENGTHS.items():
        utterances = [(f"{split}{v}", u) for v, length in enumerate(lengths) for u in range(1, length + 1)]
        tables = {name: [] for name in WIDTHS}
        for row, index in enumerate(rng.permutation(len(utterances))):
            video, utterance = utterances[index]
            label = (utterance + len(video)) % 2
            lines.append(f'{split},{row},{video},{utterance},{label},"WELL, YES"')
            for name, width in WIDTHS.items():
                values = [utterance, *rng.normal(size=width - 1), label]
                tables[name].append(",".join(f'"{value}"' for value in values))
        for name, rows in tables.items():
            (tmp_path / f"{name}_{split}.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "manifest.csv").write_text("\n".join(lines) + "\n")
    return MosiContextualConfig(path=str(tmp_path), data_dir=str(tmp_path / "prepared"))


def names(samples):
    return {sample["id"] for sample in samples}


def test_a_video_is_a_sequence(config):
    splits = data.load(config)
    assert splits.info.features == WIDTHS
    assert (splits.info.task.kind, splits.info.task.n_outputs, splits.info.task.per) == ("classification", 2, "step")
    for part in (splits.train, splits.valid, splits.test):
        for sample in part:
            sample = checked(sample, splits.info)
            length = len(sample["label"])
            assert length == LENGTHS[sample["id"][:-1]][int(sample["id"][-1])]
            for values in sample["inputs"].values():
                np.testing.assert_array_equal(values[:, 0], np.arange(1, length + 1))
            np.testing.assert_array_equal(sample["label"], (np.arange(1, length + 1) + len(sample["id"])) % 2)


def test_validation_is_drawn_by_video_and_seed(config):
    splits = data.load(config)
    assert len(splits.valid) == 2 and len(splits.train) == 8
    assert names(splits.train) | names(splits.valid) == {f"train{i}" for i in range(10)}
    assert names(splits.test) == {f"test{i}" for i in range(3)}
    assert names(data.load(config).valid) == names(splits.valid)
    others = {frozenset(names(data.load(dataclasses.replace(config, split_seed=s)).valid)) for s in range(4)}
    assert len(others) > 1
    for fraction in (0.0, 0.04, 1.0):
        with pytest.raises(DataError, match="videos would be for validation"):
            data.load(dataclasses.replace(config, valid_fraction=fraction))


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("manifest.csv", "utterance", "number", "lacks the columns utterance"),
        ("manifest.csv", "test,0,", "test,1,", "rows of split test are not numbered 0..5"),
        ("manifest.csv", "test,0,", "dev,0,", "expected train or test"),
        ("audio_test.csv", '"0"\n', '"1"\n', "row . has the label 1 .* but 0 in manifest.csv"),
        ("video_train.csv", '","', '","0","', "the training file has|no table of numbers"),
    ],
)
def test_files_that_do_not_fit(config, tmp_path, file, old, new, message):
    path = tmp_path / file
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(DataError, match=f"{file}.*{message}"):
        data.load(config)


def test_absent_files(config, tmp_path):
    with pytest.raises(DataError, match="data.path is empty; set it .* --data.path FOLDER"):
        data.load(MosiContextualConfig())
    with pytest.raises(DataError, match="is no folder .* correct data.path"):
        data.load(MosiContextualConfig(path=str(tmp_path / "nowhere")))
    (tmp_path / "text_test.csv").write_text("".join((tmp_path / "text_test.csv").read_text().splitlines(True)[1:]))
    with pytest.raises(DataError, match="text_test.csv has 5 rows, expected 6, those of manifest.csv"):
        data.load(config)
    (tmp_path / "text_test.csv").unlink()
    with pytest.raises(DataError, match="lacks text_test.csv .* get the files of the contextual CMU-MOSI files again"):
        data.load(config)


def test_the_real_files(tmp_path):
    splits = data.load(
        MosiContextualConfig(path=real_data.folder("mosi_contextual"), data_dir=str(tmp_path / "prepared"))
    )
    assert splits.info.features == {"text": 100, "audio": 73, "video": 100}
    assert [len(part) for part in (splits.train, splits.valid, splits.test)] == [50, 12, 31]
    lengths = [[len(sample["label"]) for sample in part] for part in (splits.train, splits.valid, splits.test)]
    assert sum(lengths[0]) + sum(lengths[1]) == 1447 and sum(lengths[2]) == 752
    assert min(map(min, lengths)) == 9 and max(map(max, lengths)) == 63
    labels = np.concatenate([sample["label"] for sample in splits.test])
    assert round(100 * max(labels.mean(), 1 - labels.mean()), 1) == 62.1
