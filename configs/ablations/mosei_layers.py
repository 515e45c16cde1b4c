"""Layers on CMU-MOSEI (Table 14): `cmamba sweep configs/ablations/mosei_layers.py --data.path FILE`."""

import pathlib

from cmamba_jax.cli import load_config
from cmamba_jax.config import SweepConfig, SweepRow

CONFIGS = pathlib.Path(__file__).parents[1]


def config() -> SweepConfig:
    """Beside the rows MAE / Corr / Acc-2 / F1 of the paper."""
    rows = (
        SweepRow("n_layers 1", (("model.n_layers", 1),), paper="55.1 / 74.7 / 84.7 / 84.8"),
        SweepRow("n_layers 2", (("model.n_layers", 2),), paper="55.3 / 74.9 / 84.9 / 84.8"),
        SweepRow("n_layers 3", (("model.n_layers", 3),), paper="54.7 / 75.6 / 85.6 / 85.5"),
        SweepRow("n_layers 4", (("model.n_layers", 4),), paper="56.6 / 74.5 / 84.8 / 84.7"),
    )
    metrics = ("mae", "corr", "non0_acc2", "non0_f1")
    return SweepConfig("mosei_layers", load_config(CONFIGS / "mosei.py"), rows, metrics=metrics)
