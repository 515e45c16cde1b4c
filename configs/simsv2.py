"""Sentiment of utterances (CH-SIMSv2, MMSA's file): `cmamba train configs/simsv2.py --data.path FILE`."""

from cmamba_jax.config import (
    EvaluationConfig,
    ExperimentConfig,
    MmsaConfig,
    OptimizerConfig,
    PipelineConfig,
    TrainConfig,
)


def config() -> ExperimentConfig:
    """The paper's settings; L1 loss, the rate halved every 50 epochs, five seeds trained together."""
    return ExperimentConfig(
        name="simsv2",
        data=MmsaConfig(dataset="simsv2"),
        pipeline=PipelineConfig(batch_size=256),
        optimizer=OptimizerConfig(clip_norm=None),
        train=TrainConfig(epochs=150, seeds=(1111, 1112, 1113, 1114, 1115)),
        evaluation=EvaluationConfig(metrics="sims"),
        paper="Table 7, Acc-2 / Acc-3 / Acc-5 / F1 / MAE / Corr: 83.4 / 75.0 / 55.1 / 83.5 / 28.7 / 75.8",
    )
