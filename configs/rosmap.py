"""Alzheimer's disease from three omics views (ROSMAP): `cmamba train configs/rosmap.py --data.path FOLDER`."""

from cmamba_jax.config import (
    EvaluationConfig,
    ExperimentConfig,
    ModelConfig,
    OmicsConfig,
    OptimizerConfig,
    PipelineConfig,
    TrainConfig,
)


def config() -> ExperimentConfig:
    """One step, as in the published code."""
    return ExperimentConfig(
        name="rosmap",
        data=OmicsConfig(),
        model=ModelConfig(d_model=32, d_state=16, n_layers=1, dropout=0.3),
        # The reader scales each feature to 0..1 over the training rows.
        pipeline=PipelineConfig(batch_size=32, normalize="none"),
        optimizer=OptimizerConfig(name="adamw", learning_rate=1e-3, weight_decay=0.05, schedule="cosine"),
        train=TrainConfig(epochs=60, monitor="loss"),
        evaluation=EvaluationConfig(metrics="omics"),
    )
