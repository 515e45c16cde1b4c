"""Subtypes of breast cancer from three omics views (BRCA): `cmamba train configs/brca.py --data.path FOLDER`."""

from cmamba_jax.config import (
    EvaluationConfig,
    ExperimentConfig,
    OmicsConfig,
    OptimizerConfig,
    PipelineConfig,
    TrainConfig,
)


def config() -> ExperimentConfig:
    """The paper's settings, one step a view as in the published code; the paper names no batch size for BRCA."""
    return ExperimentConfig(
        name="brca",
        data=OmicsConfig(),
        # The reader scales each feature to 0..1 over the training rows.
        pipeline=PipelineConfig(batch_size=128, normalize="none"),
        optimizer=OptimizerConfig(clip_norm=None),
        train=TrainConfig(epochs=150, seeds=(1111, 1112, 1113, 1114, 1115)),
        evaluation=EvaluationConfig(metrics="omics"),
        paper="Table 5, Acc / weighted F1 / macro F1: 88.1 / 88.5 / 85.4",
    )
