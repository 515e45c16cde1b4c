"""What is removed: the share that was asked for, of the right things, by the seed alone, more at a higher rate."""

import dataclasses
import itertools

import numpy as np
import pytest

from cmamba_jax import data
from cmamba_jax.config import MissingConfig, PipelineConfig, TaskConfig
from cmamba_jax.data import missing
from cmamba_jax.data.checks import DataError

L, RATES = 40, (0.1, 0.3, 0.5, 0.7)
WIDTHS = {"text": 5, "audio": 3, "video": 2}
KINDS = ("element", "modality", "step")


def make_sample(seed=0, absent=()):
    rng = np.random.default_rng(seed)
    mask = {name: np.full(L, name not in absent) for name in WIDTHS}
    for name in WIDTHS:
        mask[name][-4:] = False
    inputs = {name: rng.uniform(1, 2, (L, w)).astype(np.float32) * mask[name][:, None] for name, w in WIDTHS.items()}
    return {"inputs": inputs, "mask": mask, "label": 1, "id": str(seed), "label_mask": np.ones(L, bool)}


def remove(sample, kind, rate, *key, **options):
    return missing.remove(sample, MissingConfig(kind, rate, **options), np.random.default_rng([1, *key]))


def gone(before, after):
    """Per modality, where something was and is no more, bool [L, F]."""
    return {name: (values != 0) & (after["inputs"][name] == 0) for name, values in before["inputs"].items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rate", RATES)
def test_the_rate_is_the_share_that_is_missing(kind, rate):
    sample = make_sample()
    removed = [gone(sample, remove(sample, kind, rate, i)) for i in range(400)]
    for name in WIDTHS:
        share = np.mean([r[name][:-4].mean() for r in removed])
        # One modality of three always stays: the one that would go last stays where all three would go.
        expected = rate - rate**3 / 3 if kind == "modality" else rate
        assert share == pytest.approx(expected, abs=0.08 if kind == "modality" else 0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_more_is_missing_at_a_higher_rate(kind):
    sample = make_sample()
    for i in range(10):
        removed = [gone(sample, remove(sample, kind, rate, i)) for rate in (0.0, *RATES, 1.0)]
        for lower, higher in itertools.pairwise(removed):
            for name in WIDTHS:
                assert not (lower[name] & ~higher[name]).any()


def test_kinds_remove_what_their_names_say():
    sample = make_sample()
    rows = [gone(sample, remove(sample, "step", 0.5))[name][:-4] for name in WIDTHS]
    assert all((r.all(1) == r.any(1)).all() and 0 < r.mean() < 1 for r in rows)
    assert not np.array_equal(rows[0][:, 0], rows[1][:, 0]), "each modality loses steps of its own"
    rows = [gone(sample, remove(sample, "element", 0.5))[name][:-4] for name in WIDTHS]
    assert all((r.all(1) != r.any(1)).any() for r in rows)
    for i in range(20):
        rows = [gone(sample, remove(sample, "modality", 0.5, i))[name][:-4] for name in WIDTHS]
        assert all(r.all() or not r.any() for r in rows)


def test_masks_tell_what_is_missing_unless_zeros_are_wanted():
    sample = make_sample()
    for kind in ("modality", "step"):
        for i in range(5):
            told, hidden = (remove(sample, kind, 0.5, i, marking=marking) for marking in ("mask", "zeros"))
            np.testing.assert_equal(hidden["inputs"], told["inputs"])
            np.testing.assert_equal(hidden["mask"], sample["mask"])
            for name, rows in gone(sample, told).items():
                np.testing.assert_array_equal(told["mask"][name], sample["mask"][name] & ~rows.any(axis=1))
            np.testing.assert_array_equal(told["label_mask"], sample["label_mask"])
    np.testing.assert_equal(remove(sample, "element", 0.5)["mask"], sample["mask"])


def test_one_modality_that_exists_always_stays():
    for absent in ((), ("audio",), ("text", "video")):
        sample = make_sample(absent=absent)
        for i in range(20):
            left = [name for name, mask in remove(sample, "modality", 1.0, i)["mask"].items() if mask.any()]
            assert len(left) == 1 and left[0] not in absent
    stays = {
        name for i in range(20) for name, m in remove(make_sample(), "modality", 1.0, i)["mask"].items() if m.any()
    }
    assert stays == set(WIDTHS)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_chosen_modalities_lose_something(kind):
    sample = make_sample()
    one, all_ = (remove(sample, kind, 0.7, modalities=chosen) for chosen in (("audio",), ()))
    for name in ("text", "video"):
        assert not gone(sample, one)[name].any() and one["mask"][name].sum() == L - 4
    if kind != "modality":
        np.testing.assert_equal(one["inputs"]["audio"], all_["inputs"]["audio"])
    assert not remove(sample, "modality", 1.0, modalities=("audio", "text"))["mask"]["audio"].any()


def make_pipeline(**config):
    info = data.DataInfo(WIDTHS, TaskConfig("classification", 2))
    samples = [make_sample(seed) for seed in range(11)]
    return data.Pipeline(data.Splits(info, samples, samples, samples), PipelineConfig(4, **config), seed=3)


def inputs(batches):
    return np.concatenate([batch.inputs["text"][batch.weight > 0] for batch in batches])


def test_evaluation_depends_on_the_seed_and_the_sample_alone():
    config = MissingConfig("element", 0.5, seed=5)
    first = inputs(make_pipeline(eval_batch_size=3).batches("test", config))
    np.testing.assert_array_equal(inputs(make_pipeline(eval_batch_size=8).batches("test", config)), first)
    other = inputs(make_pipeline().batches("test", dataclasses.replace(config, seed=6)))
    assert (other != first).any()
    assert (inputs(make_pipeline().batches("valid", config)) != first).any()
    whole = inputs(make_pipeline().batches("test"))
    np.testing.assert_array_equal(first, np.where(first == 0, 0, whole))


def test_training_draws_anew_every_epoch_and_leaves_other_splits_whole():
    pipeline = make_pipeline(missing=MissingConfig("modality", 0.6))
    iterator = pipeline.train()
    epochs = [[next(iterator) for _ in range(pipeline.steps_per_epoch)] for _ in range(2)]
    kept = [sorted(b.mask["text"][b.weight > 0].any(1).sum() for b in epoch) for epoch in epochs]
    assert any(count < 4 for count in kept[0]) and kept[0] != kept[1]
    assert all(batch.mask["text"][batch.weight > 0].any(1).all() for batch in pipeline.batches("valid"))
    again = make_pipeline(missing=MissingConfig("modality", 0.6)).train()
    np.testing.assert_array_equal(next(again).inputs["audio"], epochs[0][0].inputs["audio"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MissingConfig("step", 1.1), "missing.rate is 1.1, expected a probability"),
        (MissingConfig(rate=0.2), "missing.kind is none; set it to element, modality or step"),
        (MissingConfig("step", 0.2, ("sound",)), "holds sound; the data has text, audio, video"),
    ],
)
def test_impossible_configurations(config, message):
    with pytest.raises(DataError, match=message):
        make_pipeline(missing=config)
    with pytest.raises(DataError, match=message):
        make_pipeline().batches("test", config)
