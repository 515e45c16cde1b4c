"""Cued recall, whose label needs both modalities at different times: `cmamba sweep configs/ablations/synthetic.py`."""

import pathlib

from cmamba_jax.cli import load_config
from cmamba_jax.config import SweepConfig, SweepRow

CONFIGS = pathlib.Path(__file__).parents[1]


def config() -> SweepConfig:
    """With and without coupling, fused late and before the head."""
    uncoupled = ("model.coupling", "independent")
    return SweepConfig(
        "cued_recall",
        load_config(CONFIGS / "synthetic.py"),
        (
            SweepRow("Coupled, shared"),
            SweepRow("No coupling, features fused before the head", (uncoupled,)),
            SweepRow("No coupling, logits averaged late", (uncoupled, ("model.fusion", "late"))),
        ),
        metrics=("accuracy",),
        note="Chance is 25%. One seed a row.",
    )
