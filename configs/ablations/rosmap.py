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
    return SweepConfig("rosmap_fusion", base, FUSIONS, widths="equal_parameters", metrics=("accuracy", "f1", "auc"))
