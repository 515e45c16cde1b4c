"""Kinds of fusion on CMU-MOSI by utterance: `cmamba sweep configs/ablations/mosi_contextual.py --data.path FOLDER`."""

import dataclasses
import pathlib

from cmamba_jax.cli import load_config
from cmamba_jax.config import SweepConfig
from cmamba_jax.train.sweep import FUSIONS, MISSING_CURVES

CONFIGS = pathlib.Path(__file__).parents[1]


def config() -> SweepConfig:
    """Equal numbers of parameters, five seeds, two layers (the layer coupling acts between two)."""
    base = load_config(CONFIGS / "mosi_contextual.py")
    base = dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, n_layers=2),
        train=dataclasses.replace(base.train, seeds=(1111, 1112, 1113, 1114, 1115), track_test=True),
    )
    return SweepConfig(
        "mosi_contextual_fusion",
        base,
        FUSIONS,
        widths="equal_parameters",
        metrics=("accuracy", "weighted_f1"),
        missing=MISSING_CURVES,
    )
