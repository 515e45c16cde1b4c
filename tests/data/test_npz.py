"""A folder of .npz files: what is written is what is read, and faults name the file."""

import numpy as np
import pytest

from cmamba_jax import data
from cmamba_jax.config import NpzConfig, PipelineConfig
from cmamba_jax.data.checks import DataError, checked

L = 4


def arrays(i, **changes):
    return {"imu": np.full((L, 3), i), "heart": np.arange(L) + i, "label": i % 3, **changes}


@pytest.fixture
def root(tmp_path):
    for split, n_samples in {"train": 6, "valid": 2, "test": 3}.items():
        (tmp_path / split).mkdir()
        for i in range(n_samples):
            np.savez(tmp_path / split / f"{i}.npz", **arrays(i))
    return tmp_path


def test_samples(root):
    splits = data.load(NpzConfig(path=str(root)))
    assert splits.info.features == {"imu": 3, "heart": 1}
    assert (splits.info.task.kind, splits.info.task.n_outputs) == ("classification", 3)
    assert splits.info.label_names == ("0", "1", "2")
    assert [sample["id"] for sample in splits.test] == ["test/0.npz", "test/1.npz", "test/2.npz"]
    sample = checked(splits.train[4], splits.info)
    assert sample["label"] == 1
    np.testing.assert_array_equal(sample["inputs"]["imu"], np.full((L, 3), 4))
    np.testing.assert_array_equal(sample["inputs"]["heart"], np.arange(L)[:, None] + 4)


def test_masks_and_labels_per_step(root):
    for path in root.glob("*/*.npz"):
        label = np.array([0, 1, 200, 1])
        np.savez(path, **arrays(0, imu_mask=np.arange(L) > 0, label=label, label_mask=label < 2))
    splits = data.load(NpzConfig(path=str(root), per="step"))
    assert splits.info.task.n_outputs == 2
    sample = checked(splits.valid[0], splits.info)
    np.testing.assert_array_equal(sample["mask"]["imu"], [False, True, True, True])
    np.testing.assert_array_equal(sample["label"], [0, 1, 0, 1])
    np.testing.assert_array_equal(sample["label_mask"], [True, True, False, True])


def test_regression_under_another_name(root):
    for path in root.glob("*/*.npz"):
        np.savez(path, imu=np.ones((L, 3)), score=[0.5, 2.0])
    splits = data.load(NpzConfig(path=str(root), task="regression", label_key="score"))
    assert splits.info.task.n_outputs == 2 and splits.info.label_names == ()
    np.testing.assert_array_equal(checked(splits.train[0], splits.info)["label"], [0.5, 2.0])


def test_pipeline_over_files(root):
    pipeline = data.Pipeline(data.load(NpzConfig(path=str(root))), PipelineConfig(batch_size=4), seed=0)
    assert next(pipeline.train()).inputs["heart"].shape == (4, L, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"imu": np.ones((L, 5))}, r"train/3.npz.*'imu' has shape \[4, 5\], expected \[L, 3\]"),
        ({"extra": np.ones((L, 5))}, "train/3.npz.*unknown modality 'extra' .expected imu, heart"),
        ({"imu": np.ones((L, 3, 2))}, r"train/3.npz.*'imu' has shape \[4, 3, 2\]"),
        ({"imu": np.array(["a"] * L)}, "train/3.npz.*dtype <U1, expected numbers"),
        ({"label": -1}, "train/3.npz.*label -1"),
        ({"label": 0.5}, "label has dtype float64, expected integers"),
        ({"label": np.array(None)}, "train/3.npz cannot be read"),
    ],
)
def test_a_file_that_does_not_fit(root, change, message):
    np.savez(root / "train" / "3.npz", **arrays(3, **change))
    with pytest.raises(DataError, match=message):
        data.Pipeline(data.load(NpzConfig(path=str(root))), PipelineConfig(), seed=0)


def test_a_file_that_lacks_something(root):
    np.savez(root / "train" / "3.npz", imu=np.ones((L, 3)), label=0)
    with pytest.raises(DataError, match=r"train/3.npz.*'heart' is absent"):
        data.Pipeline(data.load(NpzConfig(path=str(root))), PipelineConfig(), seed=0)
    np.savez(root / "train" / "3.npz", imu=np.ones((L, 3)))
    with pytest.raises(DataError, match=r"train/3.npz holds no array 'label'; .* data.label_key"):
        data.load(NpzConfig(path=str(root)))
    np.savez(root / "train" / "0.npz", label=0)
    (root / "train" / "3.npz").unlink()
    with pytest.raises(DataError, match=r"train/0.npz holds no array but the label"):
        data.load(NpzConfig(path=str(root)))


def test_a_damaged_file(root):
    path = root / "valid" / "1.npz"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DataError, match=r"valid/1.npz cannot be read .* np.savez"):
        data.load(NpzConfig(path=str(root)))


def test_folders(root, tmp_path):
    with pytest.raises(DataError, match="data.path is empty; set it"):
        data.load(NpzConfig())
    with pytest.raises(DataError, match="nowhere is no folder .* correct data.path"):
        data.load(NpzConfig(path=str(tmp_path / "nowhere")))
    for path in (root / "valid").iterdir():
        path.unlink()
    (root / "valid").rmdir()
    with pytest.raises(DataError, match=r"valid holds no .npz file .* move a tenth of the files of .*/train there"):
        data.load(NpzConfig(path=str(root)))
