"""Sentiment of utterances (CMU-MOSI, MMSA's file): `cmamba train configs/mosi.py --data.path unaligned_50.pkl`."""

from cmamba_jax.config import (
    EvaluationConfig,
    ExperimentConfig,
    MmsaConfig,
    OptimizerConfig,
    PipelineConfig,
    TrainConfig,
)


def config() -> ExperimentConfig:
    """The paper names no batch size for CMU-MOSI: 128, that of CH-SIMS, which is of its size."""
    return ExperimentConfig(
        name="mosi",
        data=MmsaConfig(dataset="mosi"),
        pipeline=PipelineConfig(batch_size=128),
        optimizer=OptimizerConfig(clip_norm=None),
        train=TrainConfig(epochs=150, seeds=(1111, 1112, 1113, 1114, 1115)),
        evaluation=EvaluationConfig(metrics="mosi"),
        paper="Table 13 is for classification, see configs/mosi_classification.py; no regression result",
    )
