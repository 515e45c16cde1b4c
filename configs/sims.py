"""Sentiment of utterances (CH-SIMS, MMSA's file): `cmamba train configs/sims.py --data.path unaligned_39.pkl`."""

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
        name="sims",
        data=MmsaConfig(dataset="sims"),
        pipeline=PipelineConfig(batch_size=128),
        optimizer=OptimizerConfig(clip_norm=None),
        train=TrainConfig(epochs=150, seeds=(1111, 1112, 1113, 1114, 1115)),
        evaluation=EvaluationConfig(metrics="sims"),
        paper="Table 2, Acc-2 / Acc-3 / Acc-5 / F1 / MAE: 81.8 / 68.7 / 42.1 / 81.3 / .409",
    )
