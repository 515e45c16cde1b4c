"""Sentiment of utterances (CMU-MOSEI, MMSA's file): `cmamba train configs/mosei.py --data.path unaligned_50.pkl`."""

from cmamba_jax.config import (
    EvaluationConfig,
    ExperimentConfig,
    MmsaConfig,
    OptimizerConfig,
    PipelineConfig,
    TrainConfig,
)


def config() -> ExperimentConfig:
    """The paper's settings (the defaults of the model and the optimiser); the published code clips no gradient.

    CMU-MOSI: `--data.dataset mosi`. CH-SIMS: `--data.dataset sims --evaluation.metrics sims --pipeline.batch-size 128`.
    CH-SIMSv2: `--data.dataset simsv2 --evaluation.metrics sims --pipeline.batch-size 256`.
    """
    return ExperimentConfig(
        name="mosei",
        data=MmsaConfig(dataset="mosei"),
        pipeline=PipelineConfig(batch_size=1024),
        optimizer=OptimizerConfig(clip_norm=None),
        train=TrainConfig(epochs=150),
        evaluation=EvaluationConfig(metrics="mosi"),
    )
