"""MMSA's feature files, written in their format: lengths, labels, one clock, and faults."""

import pathlib
import pickle

import numpy as np
import pytest

from cmamba_jax import data
from cmamba_jax.config import MmsaConfig, PipelineConfig
from cmamba_jax.data import mmsa, records
from cmamba_jax.data.checks import DataError, checked

COUNTS = {"train": 5, "valid": 2, "test": 3}
STEPS = {"text": 6, "audio": 24, "vision": 15}
WIDTHS = {"text": 4, "audio": 3, "vision": 2}


def content(steps=STEPS, widths=WIDTHS, aligned=False, sims=False, counts=COUNTS):
    rng, parts = np.random.default_rng(0), {}
    for split, n in counts.items():
        lengths = {m: rng.integers(1, steps[m] + 1, n) for m in steps}
        part = {
            m: rng.uniform(1, 2, (n, steps[m], w)) * (np.arange(steps[m]) < lengths[m][:, None])[..., None]
            for m, w in widths.items()
        }
        part["audio"][0, 0, 0] = -np.inf
        ids = rng.integers(1000, 2000, (n, steps["text"])) * (np.arange(steps["text"]) < lengths["text"][:, None])
        part |= {
            "raw_text": np.array([f"utterance {i}" for i in range(n)], dtype=object),
            "id": [f"video$_${i}" for i in range(n)],
            "text_bert": np.stack([ids, ids > 0, 0 * ids], axis=1).astype(np.float32),
            "annotations": ["Negative"] * n,
            "regression_labels": rng.uniform(-3, 3, n).astype(np.float32),
            "classification_labels": rng.integers(0, 3, n),
        }
        if not aligned:
            part |= {f"{m}_lengths": lengths[m].tolist() for m in ("audio", "vision")}
        if sims:
            part |= {f"regression_labels_{m}": rng.uniform(-1, 1, n) for m in "TAV"}
        parts[split] = part
    return parts


@pytest.fixture
def write(tmp_path):
    def write(parts, *, counts="any", **options):
        path = tmp_path / "unaligned_50.pkl"
        path.write_bytes(pickle.dumps(parts, 4))
        return MmsaConfig(path=str(path), data_dir=str(tmp_path / "prepared"), counts=counts, **options)

    return write


def test_unaligned_modalities_share_the_clock_of_the_text(write):
    parts = content()
    splits = data.load(write(parts))
    assert splits.info.features == WIDTHS and splits.info.task.kind == "regression"
    for name, samples in (("train", splits.train), ("valid", splits.valid), ("test", splits.test)):
        part = parts[name]
        assert len(samples) == COUNTS[name]
        for i, sample in enumerate(samples):
            sample = checked(sample, splits.info)
            assert sample["id"] == f"video$_${i}"
            assert sample["label"] == part["regression_labels"][i]
            n_text = int(part["text_bert"][i, 1].sum())
            np.testing.assert_allclose(sample["inputs"]["text"][:n_text], part["text"][i, :n_text], rtol=1e-6)
            assert sample["mask"]["text"].sum() == n_text
            audio = np.where(np.isinf(part["audio"][i]), 0, part["audio"][i])
            # Windows of 4 of the 24 steps.
            whole = part["audio_lengths"][i] // 4
            windows = audio.reshape(6, 4, 3).mean(axis=1)[:whole]
            np.testing.assert_allclose(sample["inputs"]["audio"][:whole], windows, rtol=1e-5)
            assert sample["mask"]["audio"].sum() == -(-part["audio_lengths"][i] // 4)
            assert np.any(list(sample["mask"].values()), axis=0)[-1], "what holds nothing is left out"


def test_true_spans_fill_the_whole_clock(write):
    parts = content()
    splits = data.load(write(parts, span="true", length=5))
    for i, sample in enumerate(splits.test):
        assert all(mask.tolist() == [True] * 5 for mask in sample["mask"].values())
        vision = parts["test"]["vision"][i, : parts["test"]["vision_lengths"][i]]
        np.testing.assert_allclose(sample["inputs"]["vision"][-1], vision[4 * len(vision) // 5 :].mean(0), rtol=1e-5)


def test_frames_keep_every_step(write):
    parts = content()
    splits = data.load(write(parts, resample="frames"))
    assert splits.info.features == {"text": 4, "audio": 4 * 3, "vision": 3 * 2}
    for i, sample in enumerate(splits.train):
        whole = parts["train"]["audio_lengths"][i] // 4
        audio = parts["train"]["audio"][i, : 4 * whole]
        np.testing.assert_allclose(
            sample["inputs"]["audio"][:whole].reshape(-1, 3), np.where(np.isinf(audio), 0, audio), rtol=1e-6
        )
    batch = next(data.Pipeline(splits, PipelineConfig(batch_size=2), seed=0).train())
    assert batch.inputs["vision"].shape[2] == 6


def test_aligned_modalities_have_the_lengths_of_the_text(write):
    steps = dict.fromkeys(STEPS, 7)
    parts = content(steps, aligned=True)
    splits = data.load(write(parts, dataset="mosi"))
    for i, sample in enumerate(splits.train):
        n_real = int(parts["train"]["text_bert"][i, 1].sum())
        assert all(mask.tolist() == [True] * n_real for mask in sample["mask"].values())
        np.testing.assert_allclose(sample["inputs"]["vision"], parts["train"]["vision"][i, :n_real], rtol=1e-6)


def test_classification_and_labels_of_single_modalities(write):
    parts = content(sims=True)
    config = write(parts, dataset="sims", task="classification")
    splits = data.load(config)
    assert splits.info.label_names == ("negative", "neutral", "positive") and splits.info.task.n_outputs == 3
    assert [sample["label"] for sample in splits.test] == parts["test"]["classification_labels"].tolist()
    builder = records.prepared_from(
        mmsa.CmambaMmsa,
        [pathlib.Path(config.path)],
        lambda: pytest.fail("the file is read again"),
        name="sims_any",
        data_dir=config.data_dir,
    )
    record = records.Records(builder, "valid", lambda record: record)[1]
    expected = [parts["valid"][f"regression_labels_{m}"][1] for m in "TAV"]
    np.testing.assert_allclose(record["unimodal_labels"], expected, rtol=1e-6)
    assert record["raw_text"] == "utterance 1"


def test_a_modality_without_a_step_is_missing(write):
    parts = content()
    parts["test"]["vision_lengths"][1] = 0
    sample = data.load(write(parts)).test[1]
    assert not sample["mask"]["vision"].any() and sample["mask"]["text"].any()
    assert not sample["inputs"]["vision"].any()


def test_published_sizes_are_read_and_counted(write):
    parts = content({"text": 50, "audio": 500, "vision": 375}, {"text": 768, "audio": 74, "vision": 35})
    config = write(parts)
    splits = data.load(config)
    assert splits.info.features == {"text": 768, "audio": 74, "vision": 35}
    assert len(checked(splits.test[0], splits.info)["inputs"]["vision"]) <= 50
    message = r"holds 5/2/3 samples .* published file has 16326/1871/4659; correct data.dataset .* data.counts to any"
    with pytest.raises(DataError, match=message):
        data.load(write(parts, counts="published"))


def drop(*keys):
    def change(parts):
        *path, last = keys
        for key in path:
            parts = parts[key]
        del parts[last]

    return change


def put(split, key, value):
    return lambda parts: parts[split].__setitem__(key, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("valid"), "expected a dict of train, valid, test, got test, train"),
        (drop("test", "vision"), "test lacks vision"),
        (drop("train", "regression_labels"), "train lacks regression_labels"),
        (drop("train", "audio_lengths"), "train lacks audio_lengths, but audio has 24 steps and text 6"),
        (put("test", "audio", np.ones((3, 24, 9))), r"test/audio is \[24, 9\] a sample, but \[24, 3\] in train"),
        (put("train", "text", np.ones((4, 6, 4))), r"train/text has shape \[4, 6, 4\]"),
        (put("train", "text", [["a"]]), "train/text has shape"),
        (put("valid", "vision_lengths", [3, 99]), "lengths of valid/vision lie in 3..99, expected 0..15"),
        (put("valid", "regression_labels", np.array([1, np.nan])), "valid/regression_labels holds a label that is no"),
        (put("valid", "classification_labels", np.array([1, 3])), "holds others than 0, 1 and 2"),
    ],
)
def test_files_that_do_not_fit(write, change, message):
    parts = content()
    change(parts)
    with pytest.raises(DataError, match=message):
        data.load(write(parts))


def test_other_faults(write, tmp_path):
    with pytest.raises(DataError, match="data.path is empty; set it .* --data.path unaligned_50.pkl"):
        data.load(MmsaConfig())
    with pytest.raises(DataError, match="does not exist .* correct data.path"):
        data.load(MmsaConfig(path=str(tmp_path / "absent.pkl")))
    with pytest.raises(DataError, match="data.length is 0"):
        data.load(write(content(), length=0))
    parts = content()
    for part in parts.values():
        del part["classification_labels"]
    with pytest.raises(DataError, match="holds no classification_labels; set data.task to regression"):
        data.load(write(parts, task="classification"))
    parts["train"]["id"] = {1, 2}
    with pytest.raises(DataError, match="not loaded because a pickle can run any code"):
        data.load(write({"train": drop}))
