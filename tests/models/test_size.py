import dataclasses

import jax
import pytest
from flax import nnx

from cmamba_jax.config import ModelConfig, TaskConfig
from cmamba_jax.errors import UserError
from cmamba_jax.models import CoupledMamba
from cmamba_jax.models.size import abstract_params, count, match_width
from cmamba_jax.train.state import split_model

FEATURES, TASK = {"text": 30, "audio": 7}, TaskConfig(n_outputs=3)
BASE = ModelConfig(d_model=24, d_state=8, n_layers=2)


def size(config):
    return count(abstract_params(config, FEATURES, TASK))


def test_the_count_is_that_of_a_real_model():
    model = CoupledMamba(BASE, features=FEATURES, task=TASK, rngs=nnx.Rngs(0))
    assert size(BASE) == sum(leaf.size for leaf in jax.tree.leaves(split_model(model)[1]))


@pytest.mark.parametrize("changes", [
    {"coupling": "cross_attention"},
    {"coupling": "released"},
    {"early_fusion": "average"},
    {"d_state": 32},
    {"n_layers": 0},
], ids=str)  # fmt: skip
def test_matched_models_are_of_equal_size(changes):
    config = dataclasses.replace(BASE, **changes)
    matched = match_width(config, FEATURES, TASK, size(BASE))
    assert abs(size(matched) / size(BASE) - 1) <= 0.05
    if config.coupling == "cross_attention":
        assert matched.d_model % matched.n_heads == 0 and 1 < matched.n_heads <= config.n_heads
    else:
        assert dataclasses.replace(matched, d_model=config.d_model) == config
    assert match_width(BASE, FEATURES, TASK, size(BASE)) == BASE


def test_a_size_that_no_width_has():
    with pytest.raises(UserError, match="no d_model gives this model 100 parameters within 5%"):
        match_width(BASE, FEATURES, TASK, 100)
