"""Sentiment of each utterance of a video (CMU-MOSI): `cmamba train configs/mosi_contextual.py --data.path FOLDER`."""

from cmamba_jax.config import (
    AugmentConfig,
    ExperimentConfig,
    ModelConfig,
    MosiContextualConfig,
    OptimizerConfig,
    PipelineConfig,
    TrainConfig,
)


def config() -> ExperimentConfig:
    """Whole videos, read in both directions; strongly regularised, since the features know the training labels."""
    return ExperimentConfig(
        name="mosi_contextual",
        data=MosiContextualConfig(),
        model=ModelConfig(d_model=32, d_state=16, n_layers=1, direction="bidirectional", dropout=0.4),
        pipeline=PipelineConfig(batch_size=8, augment=AugmentConfig(jitter=0.5)),
        optimizer=OptimizerConfig(name="adamw", learning_rate=1e-3, weight_decay=0.1, schedule="cosine"),
        train=TrainConfig(epochs=30, monitor="accuracy"),
    )
