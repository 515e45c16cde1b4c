"""State size on CMU-MOSEI (Table 10): `cmamba sweep configs/ablations/mosei_d_state.py --data.path FILE`."""

import pathlib

from cmamba_jax.cli import load_config
from cmamba_jax.config import SweepConfig, SweepRow

CONFIGS = pathlib.Path(__file__).parents[1]


def config() -> SweepConfig:
    """Beside the rows Corr / Acc-2 / F1 of the paper."""
    rows = (
        SweepRow("d_state 128", (("model.d_state", 128),), paper="74.1 / 84.2 / 84.1"),
        SweepRow("d_state 64", (("model.d_state", 64),), paper="75.6 / 85.6 / 85.5"),
        SweepRow("d_state 32", (("model.d_state", 32),), paper="75.0 / 84.9 / 84.9"),
    )
    metrics = ("corr", "non0_acc2", "non0_f1")
    return SweepConfig("mosei_d_state", load_config(CONFIGS / "mosei.py"), rows, metrics=metrics)
