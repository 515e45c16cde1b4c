"""Kinds of fusion on the watch data, five folds of people: `cmamba sweep configs/ablations/watch.py`."""

import pathlib

from cmamba_jax.cli import load_config
from cmamba_jax.config import SweepConfig
from cmamba_jax.train.sweep import FUSIONS, MISSING_CURVES

CONFIGS = pathlib.Path(__file__).parents[1]


def config() -> SweepConfig:
    """Equal numbers of parameters; settings of configs/watch.py, which were chosen for the coupled model."""
    return SweepConfig(
        "watch_fusion",
        load_config(CONFIGS / "watch.py"),
        FUSIONS,
        widths="equal_parameters",
        folds="all",
        metrics=("accuracy", "weighted_f1"),
        missing=MISSING_CURVES,
    )
