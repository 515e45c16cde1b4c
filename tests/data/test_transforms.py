"""Normalisation equals numpy on the concatenation; random changes do what their names say and are reproducible."""

import json

import numpy as np
import pytest

from cmamba_jax.config import AugmentConfig
from cmamba_jax.data import transforms
from cmamba_jax.data.checks import DataError
from cmamba_jax.data.transforms import Normalizer

WIDTHS = {"imu": 3, "sound": 2}


def make_sample(rng, length=None, share=0.7):
    length = length or int(rng.integers(1, 30))
    return {
        "inputs": {m: rng.normal(5, 3, (length, width)).astype(np.float32) for m, width in WIDTHS.items()},
        "mask": {m: rng.uniform(size=length) < share for m in WIDTHS},
        "label": np.arange(length, dtype=np.int32),
        "label_mask": rng.uniform(size=length) < share,
        "id": "x",
    }


@pytest.fixture
def samples():
    rng = np.random.default_rng(0)
    return [make_sample(rng) for _ in range(40)]


def valid_steps(samples, name):
    return np.concatenate([s["inputs"][name][s["mask"][name]] for s in samples]).astype(np.float64)


def test_standard_equals_numpy_on_the_concatenation(samples):
    normalizer = Normalizer.fit(iter(samples), "standard")
    for name in WIDTHS:
        steps = valid_steps(samples, name)
        np.testing.assert_allclose(normalizer.offset[name], steps.mean(axis=0), rtol=1e-6)
        np.testing.assert_allclose(normalizer.scale[name], steps.std(axis=0), rtol=1e-6)
    scaled = valid_steps([normalizer(s) for s in samples], "imu")
    np.testing.assert_allclose(scaled.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(scaled.std(axis=0), 1, rtol=1e-5)


def test_minmax_reaches_from_0_to_1(samples):
    normalizer = Normalizer.fit(samples, "minmax")
    scaled = valid_steps([normalizer(s) for s in samples], "sound")
    np.testing.assert_allclose(scaled.min(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(scaled.max(axis=0), 1, rtol=1e-6)


def test_none_changes_existing_steps_not_at_all(samples):
    normalizer = Normalizer.fit(samples, "none")
    np.testing.assert_array_equal(valid_steps([normalizer(samples[0])], "imu"), valid_steps(samples[:1], "imu"))


def test_masked_steps_do_not_count_and_become_zero(samples):
    normalizer = Normalizer.fit(samples, "standard")
    for sample in samples:
        for name, mask in sample["mask"].items():
            sample["inputs"][name][~mask] = 1e6
    again = Normalizer.fit(samples, "standard")
    np.testing.assert_equal(again.to_dict(), normalizer.to_dict())
    result = again(samples[3])
    assert not result["inputs"]["imu"][~samples[3]["mask"]["imu"]].any()
    assert result["inputs"]["imu"].dtype == np.float32


@pytest.mark.parametrize("kind", ["standard", "minmax"])
def test_constant_features_keep_scale_1(samples, kind):
    for sample in samples:
        sample["inputs"]["imu"][:, 1] = 0.1
    normalizer = Normalizer.fit(samples, kind)
    assert normalizer.scale["imu"][1] == 1
    np.testing.assert_allclose(normalizer(samples[0])["inputs"]["imu"][:, 1], 0, atol=1e-7)


def test_dict_round_trip_through_json_is_exact(samples):
    normalizer = Normalizer.fit(samples, "standard")
    again = Normalizer.from_dict(json.loads(json.dumps(normalizer.to_dict())))
    np.testing.assert_equal(again(samples[1]), normalizer(samples[1]))


def test_nothing_to_fit(samples):
    with pytest.raises(DataError, match="no training sample"):
        Normalizer.fit([], "standard")
    for sample in samples:
        sample["mask"]["sound"][:] = False
    with pytest.raises(DataError, match="'sound' is masked in every training sample .* pipeline.normalize"):
        Normalizer.fit(samples, "standard")


ALL = AugmentConfig(scale=0.2, rotation=40.0, time_warp=0.3, mirror=(-1, 1, 1, 1, -1))


def test_augmentation_follows_its_random_numbers(samples):
    first, again, other = (transforms.augment(samples[0], ALL, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_equal(first, again)
    assert not np.array_equal(first["inputs"]["imu"], other["inputs"]["imu"])
    assert {m: v.shape for m, v in first["inputs"].items()} == {m: v.shape for m, v in samples[0]["inputs"].items()}
    assert all(v.dtype == np.float32 for v in first["inputs"].values())


def test_zero_switches_each_change_off(samples):
    rng = np.random.default_rng(0)
    result = transforms.jitter(transforms.augment(samples[0], AugmentConfig(), rng), 0.0, rng)
    np.testing.assert_equal(result, samples[0])


def test_rotation_turns_all_sensors_alike_within_the_largest_angle():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(200, 3)).astype(np.float32)
    sample = {"inputs": {"acc": vectors, "gyro": 2 * vectors, "sound": vectors[:, :2]}}
    angles = []
    for _ in range(50):
        turned = transforms.rotate(sample, 30.0, rng)["inputs"]
        matrix = np.linalg.lstsq(vectors, turned["acc"], rcond=None)[0]
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-5)
        assert np.linalg.det(matrix) == pytest.approx(1, abs=1e-5)
        np.testing.assert_allclose(turned["gyro"], 2 * turned["acc"], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(turned["sound"], vectors[:, :2])
        angles.append(np.degrees(np.arccos((np.trace(matrix) - 1) / 2)))
    assert max(angles) < 30.1 and min(angles) < 5 and np.mean(angles) == pytest.approx(15, abs=5)


def test_mirror_flips_the_named_signs_of_half_of_the_samples(samples):
    signs, rng = (-1, 1, 1, 1, -1), np.random.default_rng(0)
    mirrored = 0
    for sample in samples * 10:
        result = transforms.mirror(sample, signs, rng)
        flipped = result["inputs"]["imu"][0, 0] == -sample["inputs"]["imu"][0, 0]
        factor = signs if flipped else np.ones(5)
        np.testing.assert_array_equal(result["inputs"]["imu"], sample["inputs"]["imu"] * np.float32(factor[:3]))
        np.testing.assert_array_equal(result["inputs"]["sound"], sample["inputs"]["sound"] * np.float32(factor[3:]))
        mirrored += flipped
    assert 160 < mirrored < 240


def test_scale_is_one_factor_a_modality(samples):
    result = transforms.scale(samples[5], 0.3, np.random.default_rng(0))["inputs"]
    factors = [np.unique(np.round(result[m] / samples[5]["inputs"][m], 4)) for m in WIDTHS]
    assert all(len(factor) == 1 for factor in factors) and factors[0] != factors[1]


def test_jitter_has_its_deviation_and_spares_missing_steps():
    sample = make_sample(np.random.default_rng(0), length=5000)
    noise = transforms.jitter(sample, 0.5, np.random.default_rng(0))["inputs"]["imu"] - sample["inputs"]["imu"]
    mask = sample["mask"]["imu"]
    assert not noise[~mask].any()
    assert noise[mask].std() == pytest.approx(0.5, rel=0.05)


def test_time_warp_changes_the_speed_of_a_ramp():
    length = 50
    ramp = np.arange(length, dtype=np.float32)[:, None]
    exists = np.ones(length, bool)
    sample = {"inputs": {"a": ramp, "b": 2 * ramp}, "mask": {"a": exists, "b": exists}, "label": 0, "id": "x"}
    speeds = []
    for seed in range(200):
        warped = transforms.time_warp(sample, 0.2, np.random.default_rng(seed))["inputs"]
        np.testing.assert_allclose(warped["b"], 2 * warped["a"], rtol=1e-6)
        steps = np.diff(warped["a"][:, 0])
        assert steps.min() >= 0 and warped["a"].min() >= 0 and warped["a"].max() <= length - 1
        inner = steps[steps > 1e-3]
        # Away from held ends, every step is the speed.
        speeds.append(np.median(inner))
        assert np.isclose(inner, speeds[-1], atol=1e-3).sum() >= len(inner) - 2
    assert np.std(np.log(speeds)) == pytest.approx(0.2, abs=0.03)


def test_time_warp_interpolates_existing_steps_only():
    rng = np.random.default_rng(3)
    sample = make_sample(rng, length=60, share=0.6)
    for name, mask in sample["mask"].items():
        sample["inputs"][name][mask] = 1
        sample["inputs"][name][~mask] = 1e6
    for seed in range(20):
        warped = transforms.time_warp(sample, 0.3, np.random.default_rng(seed))
        for name, mask in warped["mask"].items():
            np.testing.assert_allclose(warped["inputs"][name][mask], 1, rtol=1e-6)
        np.testing.assert_array_equal(warped["label_mask"], sample["label_mask"][warped["label"]])


def test_time_warp_never_loses_all_steps():
    sample = make_sample(np.random.default_rng(0), length=40)
    for mask in sample["mask"].values():
        mask[:] = np.arange(40) == 39
    for seed in range(50):
        assert transforms.time_warp(sample, 0.5, np.random.default_rng(seed))["mask"]["imu"].any()


def test_swap_moves_steps_within_a_modality():
    values = np.arange(200, dtype=np.float32)[:, None]
    sample = {
        "inputs": {"a": values, "b": values + 1000},
        "mask": {"a": np.arange(200) % 2 == 0, "b": np.ones(200, bool)},
        "label": 0,
        "id": "x",
    }
    out = transforms.swap(sample, 0.5, np.random.default_rng(0))
    moved = {name: out["inputs"][name] != sample["inputs"][name] for name in "ab"}
    assert 0.4 < moved["a"].mean() < 0.6 and (moved["a"] != moved["b"]).any()
    assert set(out["inputs"]["a"].ravel()) <= set(values.ravel())
    np.testing.assert_array_equal(out["mask"]["a"], out["inputs"]["a"][:, 0] % 2 == 0)
    assert transforms.swap(sample, 0.0, np.random.default_rng(0)) is sample
