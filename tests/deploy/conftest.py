import dataclasses
import pathlib

import numpy as np
import pytest
import tiny
from flax import nnx

from cmamba_jax.config import ExperimentConfig, ModelConfig, TaskConfig
from cmamba_jax.data import DataInfo, Normalizer
from cmamba_jax.models import CoupledMamba
from cmamba_jax.train.inference import Run

FEATURES = {"text": 3, "audio": 2}
SMALL = ModelConfig(d_model=4, d_state=2, n_layers=2, head_hidden=4, scan="reference", pooling="mean")


@pytest.fixture(autouse=True)
def _quick_compilation():
    with tiny.quick_compilation():
        yield


@pytest.fixture(scope="session")
def make_run():
    """A run of a small untrained model of two modalities, whose normaliser changes the values."""

    def make(kind="classification", per="sequence", n_outputs=3, **changes):
        config = dataclasses.replace(SMALL, **changes)
        info = DataInfo(FEATURES, TaskConfig(kind, n_outputs, per), tuple("abcdefgh"[:n_outputs]))
        rng = np.random.default_rng(1)
        offset, scale = ({m: rng.uniform(0.5, 2, f).astype(np.float32) for m, f in FEATURES.items()} for _ in range(2))
        model = CoupledMamba(config, features=FEATURES, task=info.task, rngs=nnx.Rngs(0))
        return Run(pathlib.Path(), ExperimentConfig("small", model=config), info, Normalizer(offset, scale), model, 3)

    return make


@pytest.fixture(scope="session")
def make_inputs():
    def make(n, length, seed=0):
        rng = np.random.default_rng(seed)
        return {m: rng.normal(size=(n, length, f)).astype(np.float32) for m, f in FEATURES.items()}

    return make
