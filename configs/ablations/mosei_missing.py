"""Missing elements on CMU-MOSEI (Table 12): `cmamba sweep configs/ablations/mosei_missing.py --data.path FILE`."""

import pathlib

from cmamba_jax.cli import load_config
from cmamba_jax.config import MissingConfig, SweepConfig, SweepRow

CONFIGS = pathlib.Path(__file__).parents[1]


def config() -> SweepConfig:
    """Elements missing at test, as in the paper; its baselines dropped whole modalities, which is another thing."""
    rates = tuple(MissingConfig("element", rate / 10) for rate in range(8))
    paper = (
        "Acc-2 / F1 at rates 0 to .7: 85.5 / 85.6, 82.6 / 82.7, 81.1 / 80.9, 81.0 / 81.0, 78.4 / 78.5, 77.4 / 77.7, "
    )
    row = SweepRow("Coupled, shared", paper=paper + "75.1 / 75.4, 74.1 / 74.2")
    metrics = ("non0_acc2", "non0_f1")
    return SweepConfig("mosei_missing", load_config(CONFIGS / "mosei.py"), (row,), metrics=metrics, missing=rates)
