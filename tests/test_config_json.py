import dataclasses
import json

import pytest

from cmamba_jax.config import (
    AugmentConfig,
    ExperimentConfig,
    ModelConfig,
    MosiContextualConfig,
    NpzConfig,
    OmicsConfig,
    OptimizerConfig,
    PipelineConfig,
    SyntheticConfig,
    TrainConfig,
    WatchConfig,
)
from cmamba_jax.config_json import check, from_dict, to_dict
from cmamba_jax.errors import UserError


@pytest.mark.parametrize("data", [
    SyntheticConfig(length=9),
    WatchConfig(fold=2),
    NpzConfig(path="x"),
    MosiContextualConfig(split_seed=1),
    OmicsConfig(n_steps=3),
    None,
])  # fmt: skip
def test_json_round_trip(data):
    config = ExperimentConfig(
        "x",
        data,
        ModelConfig(dt_rank=3),
        PipelineConfig(buckets=(8, 16), augment=AugmentConfig(jitter=0.1)),
        OptimizerConfig(clip_norm=None),
        TrainConfig(patience=4, resume=True),
    )
    assert from_dict(ExperimentConfig, json.loads(json.dumps(to_dict(config)))) == config


def changed(path, value):
    config = ExperimentConfig("x", SyntheticConfig())
    section, _, name = path.rpartition(".")
    if not section:
        return dataclasses.replace(config, **{name: value})
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{name: value})})


@pytest.mark.parametrize(("path", "value", "message"), [
    ("model.coupling", "ful", "model.coupling has to be one of shared, full, .* got 'ful'; did you mean 'full'"),
    ("model.d_model", "64", "model.d_model has to be of type int, got '64'"),
    ("model.d_model", 0, "model.d_model has to be >= 1, got 0"),
    ("model.d_model", True, "model.d_model has to be of type int, got True"),
    ("model.dropout", 1.0, "model.dropout has to be < 1, got 1.0"),
    ("optimizer.learning_rate", float("nan"), "optimizer.learning_rate has to be >= 0, got nan"),
    ("pipeline.buckets", 8, "pipeline.buckets has to be a list"),
    ("pipeline.buckets", ("a",), r"pipeline.buckets\[0\] has to be of type int"),
    ("train.patience", 0, "train.patience has to be >= 1"),
    ("train", ModelConfig(), "unknown field 'train.d_model'"),
    ("data", "watch", "data has to be one of WatchConfig, SyntheticConfig, NpzConfig, .*, got 'watch'"),
    ("name", "a/b", "name has to be a plain folder name"),
])  # fmt: skip
def test_impossible_values(path, value, message):
    with pytest.raises(UserError, match=message):
        check(changed(path, value))


def test_unknown_fields_get_a_suggestion():
    with pytest.raises(UserError, match="unknown field 'model.d_sate'; did you mean 'd_state'?"):
        from_dict(ExperimentConfig, {"name": "x", "model": {"d_sate": 3}})


def test_whole_numbers_are_floats_too():
    config = changed("optimizer.learning_rate", 1)
    assert check(config) is config
