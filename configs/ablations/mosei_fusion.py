"""Kinds of fusion on CMU-MOSEI (Tables 8 and 11): `cmamba sweep configs/ablations/mosei_fusion.py --data.path FILE`."""

import dataclasses
import pathlib

from cmamba_jax.cli import load_config
from cmamba_jax.config import SweepConfig
from cmamba_jax.train.sweep import FUSIONS

METRICS = ("mae", "corr", "non0_acc2", "non0_f1")

CONFIGS = pathlib.Path(__file__).parents[1]


def config() -> SweepConfig:
    """All of `sweep.FUSIONS` at equal numbers of parameters; beside them MAE / Corr / Acc-2 / F1 of the paper."""
    paper = {
        "Coupled, shared": "54.7 / 75.6 / 85.6 / 85.5",
        "Mamba, no coupling": "55.3 / 74.9 / 85.3 / 85.3",
        "Average, no layers": "56.4 / 73.6 / 84.2 / 84.1",
        "Concatenation, no layers": "56.2 / 72.8 / 84.8 / 84.5",
        "Cross-attention": "55.9 / 73.3 / 84.6 / 84.5",
    }
    rows = tuple(dataclasses.replace(row, paper=paper.get(row.label, "")) for row in FUSIONS)
    base = load_config(CONFIGS / "mosei.py")
    return SweepConfig("mosei_fusion", base, rows, widths="equal_parameters", metrics=METRICS)
