"""The pipeline: every sample once, few static shapes, and the same numbers after a resume."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from cmamba_jax import data
from cmamba_jax.config import AugmentConfig, PipelineConfig, TaskConfig
from cmamba_jax.data.checks import DataError, checked

N = 37
INFO = data.DataInfo(features={"imu": 3, "sound": 2}, task=TaskConfig(kind="classification", n_outputs=N))
CONFIG = PipelineConfig(batch_size=8, eval_batch_size=5, buckets=(30, 10, 20))
ALL = AugmentConfig(jitter=0.1, scale=0.2, rotation=40.0, time_warp=0.3)


def make_samples(n_samples, seed):
    """Labels are the numbers of the samples."""
    rng = np.random.default_rng(seed)
    samples = []
    for i in range(n_samples):
        length = int(rng.integers(1, 31))
        mask = rng.uniform(size=length) < 0.8
        mask[0] = True
        inputs = {name: rng.normal(2, 3, (length, width)) for name, width in INFO.features.items()}
        samples.append({"inputs": inputs, "mask": {"imu": mask}, "label": i, "id": f"{seed}/{i}"})
    return samples


def make_splits(**changes):
    parts = {"train": make_samples(N, 0), "valid": make_samples(7, 1), "test": make_samples(12, 2)}
    return data.Splits(INFO, **{**parts, **changes})


def make_pipeline(splits=None, *, seed=3, normalizer=None, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    return data.Pipeline(splits or make_splits(), config, seed=seed, normalizer=normalizer)


def take(iterator, n):
    return [next(iterator) for _ in range(n)]


def labels(batches):
    return np.concatenate([batch.labels[batch.weight > 0] for batch in batches])


def assert_equal(first, second):
    for a, b in zip(first, second, strict=True):
        np.testing.assert_equal(dataclasses.asdict(a), dataclasses.asdict(b))


def test_every_sample_once_per_epoch_in_an_order_of_its_own():
    pipeline = make_pipeline()
    iterator = pipeline.train()
    epochs = [labels(take(iterator, pipeline.steps_per_epoch)) for _ in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(N))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    again = labels(take(make_pipeline().train(), pipeline.steps_per_epoch))
    np.testing.assert_array_equal(again, epochs[0])
    other = labels(take(make_pipeline(seed=4).train(), pipeline.steps_per_epoch))
    assert not np.array_equal(other, epochs[0])


def test_padding_is_zero_and_masked_and_changes_nothing():
    tight, wide = make_pipeline(buckets=()), make_pipeline(buckets=(50,))
    for a, b in zip(tight.batches("test"), wide.batches("test"), strict=True):
        for name in INFO.features:
            length = a.inputs[name].shape[1]
            assert b.inputs[name].shape[1] == 50
            np.testing.assert_array_equal(b.inputs[name][:, :length], a.inputs[name])
            np.testing.assert_array_equal(b.mask[name][:, :length], a.mask[name])
            assert not b.inputs[name][:, length:].any() and not b.mask[name][:, length:].any()
            assert not a.inputs[name][~a.mask[name]].any()


def test_batches_hold_the_normalised_samples_in_order():
    splits = make_splits()
    pipeline = make_pipeline(splits)
    batches = list(pipeline.batches("test"))
    np.testing.assert_array_equal(labels(batches), np.arange(12))
    for i, sample in enumerate(splits.test):
        batch, row = batches[i // 5], i % 5
        length = len(sample["inputs"]["imu"])
        expected = (sample["inputs"]["imu"] - pipeline.normalizer.offset["imu"]) / pipeline.normalizer.scale["imu"]
        mask = sample["mask"]["imu"]
        np.testing.assert_allclose(batch.inputs["imu"][row, :length][mask], expected[mask], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(batch.mask["imu"][row, :length], mask)
        np.testing.assert_array_equal(batch.mask["sound"][row], np.arange(batch.mask["sound"].shape[1]) < length)


def test_batches_can_be_iterated_again():
    batches = make_pipeline().batches("valid")
    assert_equal(list(batches), list(batches))


def test_buckets_give_few_shapes():
    pipeline = make_pipeline()
    batches = take(pipeline.train(), 2 * pipeline.steps_per_epoch) + list(pipeline.batches("train"))
    shapes = {tuple(x.shape for x in jax.tree.leaves(batch)) for batch in batches}
    assert {batch.inputs["imu"].shape[1] for batch in batches} == {10, 20, 30}
    assert len(shapes) <= 6
    assert {x.shape[0] for batch in batches[: pipeline.steps_per_epoch] for x in jax.tree.leaves(batch)} == {8}


def test_filler_rows_have_no_weight_but_valid_content():
    *_, last = make_pipeline().batches("test")
    np.testing.assert_array_equal(last.weight, [1, 1, 0, 0, 0])
    np.testing.assert_array_equal(last.inputs["imu"][2:], last.inputs["imu"][[0, 0, 0]])
    assert last.mask["imu"].any(axis=1).all()


@pytest.mark.parametrize("read_threads", [0, 3])
def test_resume_gives_the_same_batches_to_the_bit(read_threads):
    pipeline = make_pipeline(augment=ALL, read_threads=read_threads)
    iterator = pipeline.train()
    take(iterator, pipeline.steps_per_epoch + 2)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, pipeline.steps_per_epoch)
    resumed = make_pipeline(augment=ALL).train()
    resumed.set_state(state)
    assert_equal(take(resumed, pipeline.steps_per_epoch), expected)


def test_augmentation_is_fresh_each_epoch_and_for_training_only():
    plain, augmented = make_pipeline(), make_pipeline(augment=ALL)
    assert_equal(plain.batches("train"), augmented.batches("train"))
    np.testing.assert_equal(plain.normalizer.to_dict(), augmented.normalizer.to_dict())
    iterator, n = augmented.train(), augmented.steps_per_epoch
    epochs = [
        {int(k): x for batch in take(iterator, n) for k, x in zip(batch.labels, batch.inputs["imu"], strict=True)}
        for _ in range(2)
    ]
    assert not any(np.array_equal(epochs[0][i], epochs[1][i]) for i in range(N))


def test_labels_per_step_are_padded_and_masked():
    info = dataclasses.replace(INFO, task=TaskConfig(kind="regression", n_outputs=1, per="step"))

    def with_steps(samples):
        for sample in samples:
            sample["label"] = np.ones(len(sample["inputs"]["imu"]))
            sample["label_mask"] = np.arange(len(sample["label"])) % 2 == 0
        return samples

    splits = data.Splits(info, *(with_steps(make_samples(9, seed)) for seed in range(3)))
    batch = next(make_pipeline(splits).train())
    assert batch.labels.shape == (*batch.label_mask.shape, 1) and batch.labels.dtype == np.float32
    np.testing.assert_array_equal(batch.labels[..., 0], batch.label_mask)
    assert not batch.label_mask[:, 1::2].any()
    assert not batch.label_mask[~batch.mask["sound"]].any()


def test_normalizer_is_fitted_on_training_samples_or_taken_as_given():
    splits = make_splits()
    fitted = make_pipeline(splits).normalizer
    training = (checked(sample, INFO) for sample in splits.train)
    np.testing.assert_equal(fitted.to_dict(), data.Normalizer.fit(training, "standard").to_dict())
    other = make_pipeline(make_splits(train=make_samples(5, 9)), normalizer=fitted)
    assert other.normalizer is fitted


def test_faults():
    bad = make_samples(7, 1)
    bad[3]["inputs"]["imu"][0, 0] = np.nan
    with pytest.raises(DataError, match="sample '1/3': modality 'imu' holds nan"):
        make_pipeline(make_splits(valid=bad))
    with pytest.raises(DataError, match="the valid split is empty"):
        make_pipeline(make_splits(valid=[]))
    with pytest.raises(DataError, match="steps, expected at most 12, the largest of pipeline.buckets; add a bucket"):
        make_pipeline(buckets=(5, 12))
    with pytest.raises(DataError, match="pipeline.batch_size is 0"):
        make_pipeline(batch_size=0)
    two_axes = data.from_arrays({"sound": np.ones((10, 5, 2))}, np.zeros(10, int))
    with pytest.raises(DataError, match="rotation is 5.0, but no modality has three features"):
        make_pipeline(two_axes, augment=AugmentConfig(rotation=5.0))
    for wrong in ((1.0, -1.0, 1.0), (1.0, 0.5)):
        with pytest.raises(DataError, match="expected 2 signs, 1 or -1"):
            make_pipeline(two_axes, augment=AugmentConfig(mirror=wrong))
    with pytest.raises(DataError, match="normalizer was fitted on the features .* the data has {'sound': 2}"):
        make_pipeline(two_axes, normalizer=make_pipeline().normalizer)
