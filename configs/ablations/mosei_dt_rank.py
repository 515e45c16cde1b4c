"""Rank of dt on CMU-MOSEI (Table 9): `cmamba sweep configs/ablations/mosei_dt_rank.py --data.path FILE`."""

import pathlib

from cmamba_jax.cli import load_config
from cmamba_jax.config import SweepConfig, SweepRow

CONFIGS = pathlib.Path(__file__).parents[1]


def config() -> SweepConfig:
    """Beside the rows Corr / Acc-2 / F1 of the paper. The published code's rank, d_model / 8 = 16, is the last row."""
    rows = (
        SweepRow("dt_rank 4", (("model.dt_rank", 4),), paper="d_state / 16: 75.3 / 85.2 / 85.0"),
        SweepRow("dt_rank 8", (("model.dt_rank", 8),), paper="d_state / 8: 75.6 / 85.6 / 85.5"),
        SweepRow("dt_rank 16", (("model.dt_rank", 16),), paper="d_state / 4: 74.2 / 85.0 / 84.9"),
    )
    metrics = ("corr", "non0_acc2", "non0_f1")
    return SweepConfig("mosei_dt_rank", load_config(CONFIGS / "mosei.py"), rows, metrics=metrics)
