import dataclasses
import json

import jax
import pytest
from flax import nnx

from cmamba_jax.config import ModelConfig, TaskConfig
from cmamba_jax.models import CoupledMamba
from cmamba_jax.train.describe import describe
from cmamba_jax.train.state import split_model


def test_description(tiny_experiment):
    description = describe(tiny_experiment)
    assert json.loads(json.dumps(description)) == description
    task = TaskConfig(kind="classification", n_outputs=2)
    model = CoupledMamba(tiny_experiment.model, features={"cue": 1, "symbols": 2}, task=task, rngs=nnx.Rngs(0))
    sizes = [leaf.size for leaf in jax.tree.leaves(split_model(model)[1])]
    total, *parts = description["parameters"].values()
    assert total == sum(sizes) == sum(parts)
    assert description["config"]["train"]["loss"] == "cross_entropy"
    assert description["config"]["model"]["dt_rank"] == 1
    assert description["data"]["length"] == tiny_experiment.data.length
    assert description["flops_per_sample"]["total"] == sum(list(description["flops_per_sample"].values())[1:])


@pytest.mark.parametrize("changes", [{"coupling": "cross_attention"}, {"n_layers": 0}], ids=str)
def test_a_model_without_scan(tiny_experiment, changes):
    config = dataclasses.replace(tiny_experiment, model=dataclasses.replace(tiny_experiment.model, **changes))
    description = describe(config)
    assert description["scan"] == {"implementation": "none", "reason": "the model has no scan"}
    assert description["flops_per_sample"]["scan"] == 0


@pytest.mark.parametrize("coupling", ["shared", "full", "independent", "released"])
def test_the_scan_and_why(tiny_experiment, coupling):
    config = dataclasses.replace(tiny_experiment, model=ModelConfig(d_model=4, d_state=2, coupling=coupling))
    assert set(describe(config)["scan"]) == {"implementation", "reason"}
    chosen = dataclasses.replace(config, model=dataclasses.replace(config.model, scan="reference"))
    assert describe(chosen)["scan"] == {"implementation": "reference", "reason": "set by model.scan"}
    unknown = dataclasses.replace(config, model=dataclasses.replace(config.model, scan="fast"))
    with pytest.raises(ValueError, match="model.scan: unknown 'fast'; known: reference"):
        describe(unknown)
