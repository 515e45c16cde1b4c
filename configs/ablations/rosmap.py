"""Kinds of fusion on ROSMAP: `cmamba sweep configs/ablations/rosmap.py --data.path FOLDER`."""

import dataclasses
import pathlib

from cmamba_jax.cli import load_config
from cmamba_jax.config import SweepConfig
from cmamba_jax.train.sweep import FUSIONS

CONFIGS = pathlib.Path(__file__).parents[1]


def config() -> SweepConfig:
    """Equal numbers of parameters, ten seeds, two layers (the layer coupling acts between two)."""
    base = load_config(CONFIGS / "rosmap.py")
    base = dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, n_layers=2),
        pipeline=dataclasses.replace(base.pipeline, eval_batch_size=64),
        train=dataclasses.replace(base.train, seeds=tuple(range(1111, 1121))),
    )
    note = (
        "A view is one step, as in the published code: the state before it is zero, so nothing is coupled, and the "
        "couplings of states are one model. References: random forest 83.0 / 83.9 / 88.7, logistic "
        "regression 81.1 / 81.8 / 90.1, on all training rows; here a fifth of them is held out for validation."
    )
    metrics = ("accuracy", "f1", "auc")
    return SweepConfig("rosmap_fusion", base, FUSIONS, widths="equal_parameters", metrics=metrics, note=note)
