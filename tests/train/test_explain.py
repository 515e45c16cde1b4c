"""On cued recall the truth is known: the cue matters at its pulse, the symbols where they are shown, nothing else."""

import dataclasses

import numpy as np
import pytest
import tiny

from cmamba_jax import data
from cmamba_jax.config import (
    ExperimentConfig,
    ModelConfig,
    OptimizerConfig,
    PipelineConfig,
    SyntheticConfig,
    TrainConfig,
)
from cmamba_jax.data import DataError, synthetic
from cmamba_jax.errors import UserError
from cmamba_jax.train import fit, load_run
from cmamba_jax.train.explain import explain

RECALL = ExperimentConfig(
    "recall",
    SyntheticConfig(n_train=2048, n_valid=32, n_test=64, length=10, n_classes=2, delay=2),
    ModelConfig(d_model=16, d_state=8, n_layers=1, pooling="mean"),
    PipelineConfig(batch_size=64),
    OptimizerConfig(name="adamw", learning_rate=1e-2, weight_decay=0.01, schedule="cosine"),
    TrainConfig(epochs=14, monitor="accuracy"),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("recall"))
    result = fit(dataclasses.replace(RECALL, train=dataclasses.replace(RECALL.train, output=folder)))
    assert result.metrics["test"]["accuracy"] > 0.95
    return load_run(result.run_dir)


def test_the_truth_of_cued_recall(trained):
    test, times = data.load(RECALL.data).test, synthetic.symbol_times(RECALL.data)
    pulse, shown, flow = [], [], []
    for i in range(32):
        sample = test[i]
        found = explain(trained, sample["inputs"], target=str(sample["label"]))
        cue, symbols = np.abs(found.attribution)
        start = int(sample["inputs"]["cue"][:, 0].argmax())
        pulse.append(cue[start] / cue.sum())
        shown.append(symbols[times].sum() / symbols.sum())
        # What the symbols' chain reads of the cue: (almost) nothing before the pulse.
        read = found.courses[0].flow[1, 0]
        flow.append(read[:start].max(initial=0) / read[start:].max())
    assert np.mean(pulse) > 0.5 and np.mean(shown) > 0.75  # Even shares: 0.1 and 0.2.
    assert max(flow) < 0.5 and np.mean(flow) < 0.1


def test_missing_samples_contribute_nothing(tiny_run):
    run = load_run(tiny_run.run_dir)
    inputs, _ = run.sample("test:0")
    masks = {"cue": np.arange(8) < 3}
    found = explain(run, inputs, masks=masks)
    assert (found.attribution[0, 3:] == 0).all() and (found.attribution[0, :3] != 0).any()
    with pytest.raises(UserError, match="expected one of 0, 1"):
        explain(run, inputs, target="2")
    with pytest.raises(DataError, match="unknown modality"):
        explain(run, inputs | {"odor": inputs["cue"]})
    with pytest.raises(UserError, match="has 12 samples, 0 to 11"):
        run.sample("test:12")


@pytest.fixture(scope="module")
def make_run():
    """An untrained run of two modalities in memory."""
    from flax import nnx

    from cmamba_jax.models import CoupledMamba

    def make(per="sequence", **changes):
        run = load_run(tiny.run().run_dir)
        task = dataclasses.replace(run.info.task, per=per)
        config = dataclasses.replace(run.config.model, **changes)
        model = CoupledMamba(config, features=run.info.features, task=task, rngs=nnx.Rngs(0))
        info = dataclasses.replace(run.info, task=task)
        return dataclasses.replace(run, model=model, info=info, config=dataclasses.replace(run.config, model=config))

    return make


def test_attributions_add_up_to_what_is_explained(make_run):
    run = make_run(d_model=16)
    inputs, _ = run.sample("test:1")
    for target in (None, 0, "1"):
        found = explain(run, inputs, target=target)
        assert found.attribution.sum() == pytest.approx(found.logit - found.baseline, rel=0.02)
    assert sum(found.shares().values()) == pytest.approx(1) and found.target == "1"


@pytest.mark.parametrize("coupling", ["independent", "full"])
def test_courses_of_both_directions_and_of_frames(make_run, coupling):
    run = make_run(coupling=coupling, direction="bidirectional", frame=3, n_layers=2)
    found = explain(run, run.sample("test:0")[0])
    assert [(c.layer, c.direction) for c in found.courses] == [
        (layer, direction) for layer in (0, 1) for direction in ("forward", "backward")
    ]
    for course in found.courses:
        assert course.energy.shape == (2, 3) and course.flow.shape == (2, 2, 3) and found.attribution.shape == (2, 8)
        between = course.flow[[0, 1], [1, 0]]
        assert between.any() == (coupling == "full")
        # A state starts with its first step in the direction of processing: nothing of the other is there yet.
        assert (between[:, 0 if course.direction == "forward" else -1] == 0).all()
    assert len(found.draw().axes) == 2 * (1 + len(found.courses) * (1 if coupling == "independent" else 2))


def test_one_step_of_many(make_run):
    run = make_run(per="step")
    inputs, _ = run.sample("test:0")
    found = explain(run, inputs, target=0, step=2)
    assert (found.attribution[:, 3:] == 0).all() and (found.attribution[:, :3] != 0).any()  # Causal.
    with pytest.raises(UserError, match="the sequence has 8 steps"):
        explain(run, inputs, step=8)
