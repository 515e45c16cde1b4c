"""Cued recall: the two modalities tell the label together, and nothing apart."""

import numpy as np
import pytest

from cmamba_jax.config import SyntheticConfig
from cmamba_jax.data import synthetic
from cmamba_jax.data.checks import DataError, checked

CONFIG = SyntheticConfig(n_train=3000, n_valid=20, n_test=20, length=48, noise=0.1)


@pytest.fixture(scope="module")
def splits():
    return synthetic.load(CONFIG)


@pytest.fixture(scope="module")
def samples(splits):
    return list(splits.train)


def pulse(sample):
    return int(sample["inputs"]["cue"][:, 0].argmax())


def symbols(sample):
    return sample["inputs"]["symbols"][synthetic.symbol_times(CONFIG)].argmax(axis=-1)


def test_both_modalities_give_the_label(samples):
    for sample in samples[:500]:
        assert sample["inputs"]["symbols"][pulse(sample) + CONFIG.delay].argmax() == sample["label"]


def test_shapes(splits):
    sample = checked(splits.valid[0], splits.info)
    assert {name: values.shape for name, values in sample["inputs"].items()} == {"cue": (48, 1), "symbols": (48, 4)}
    assert len(splits.train) == 3000 and len(splits.valid) == len(splits.test) == 20


def chi_squared(table):
    expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
    return ((table - expected) ** 2 / expected).sum()


def test_the_cue_alone_does_not_tell_the_label(samples):
    # 12 pulse times x 4 classes: 33 degrees of freedom; 63.9 is the 99.9% quantile.
    table = np.zeros((12, 4))
    for sample in samples:
        table[
            (pulse(sample) + CONFIG.delay - synthetic.symbol_times(CONFIG)[0]) // synthetic.SPACING, sample["label"]
        ] += 1
    assert chi_squared(table) < 63.9


def test_a_symbol_alone_does_not_tell_the_label(samples):
    # A slot is the cued one in 1/12 of the samples, but then the other slots hold this class less often.
    shown = np.array([symbols(sample) for sample in samples])
    label = np.array([sample["label"] for sample in samples])
    agreement = (shown == label[:, None]).mean(axis=0)
    np.testing.assert_allclose(agreement, 1 / 4, atol=4 * np.sqrt(0.25 * 0.75 / len(samples)))


def test_every_class_is_shown_equally_often(samples):
    for sample in samples[:100]:
        np.testing.assert_array_equal(np.bincount(symbols(sample), minlength=4), 3)


@pytest.mark.parametrize("changes", [{"delay": 1}, {"delay": 7}, {"length": 31, "n_classes": 5}, {"n_classes": 2}])
def test_every_symbol_can_be_cued_within_the_sequence(changes):
    config = SyntheticConfig(**{"n_train": 300, "noise": 0.0, "length": 48, **changes})
    times = synthetic.symbol_times(config)
    assert len(times) % config.n_classes == 0 and times.max() < config.length
    pulses = {pulse(sample) for sample in synthetic.load(config).train}
    assert pulses == set((times - config.delay).tolist())


def test_samples_depend_on_seed_split_and_index_alone(splits):
    again = synthetic.load(CONFIG)
    np.testing.assert_equal(again.train[7], splits.train[7])
    np.testing.assert_equal(splits.train[-1], splits.train[2999])
    other = synthetic.load(SyntheticConfig(seed=1, length=48))
    cues = [part[7]["inputs"]["cue"] for part in (splits.train, splits.valid, splits.test, other.train)]
    cues.append(splits.train[8]["inputs"]["cue"])
    assert len({cue.tobytes() for cue in cues}) == len(cues)
    with pytest.raises(IndexError):
        splits.valid[20]


@pytest.mark.parametrize("changes", [{"length": 12}, {"n_classes": 1}, {"delay": 0}])
def test_faults(changes):
    with pytest.raises(DataError, match="change data.length"):
        synthetic.load(SyntheticConfig(**changes))
