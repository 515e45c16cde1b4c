"""Kinds of fusion on CMU-MOSI by utterance: `cmamba sweep configs/ablations/mosi_contextual.py --data.path FOLDER`."""

import dataclasses
import pathlib

from cmamba_jax.cli import load_config
from cmamba_jax.config import AugmentConfig, SweepConfig
from cmamba_jax.train.sweep import FUSIONS, MISSING_CURVES

CONFIGS = pathlib.Path(__file__).parents[1]


def config() -> SweepConfig:
    """Equal numbers of parameters, five seeds, two layers (the layer coupling acts between two).

    The text features were fitted on the training labels: a linear model gets 98% on the training and validation videos
    and 76% on test. With noise of 8 standard deviations on every feature it gets 80% in training too; only then does
    it pay to read the neighbouring utterances. The noise was set so, and no setting was chosen on test data.
    """
    base = load_config(CONFIGS / "mosi_contextual.py")
    base = dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, n_layers=2),
        pipeline=dataclasses.replace(base.pipeline, eval_batch_size=16, augment=AugmentConfig(jitter=8.0)),
        optimizer=dataclasses.replace(base.optimizer, learning_rate=2e-3),
        train=dataclasses.replace(
            base.train, epochs=15, monitor="loss", seeds=(1111, 1112, 1113, 1114, 1115), track_test=True
        ),
    )
    return SweepConfig(
        "mosi_contextual_fusion",
        base,
        FUSIONS,
        widths="equal_parameters",
        metrics=("accuracy", "weighted_f1"),
        missing=MISSING_CURVES,
    )
