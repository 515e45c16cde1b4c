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

    The rate is halved every 50 epochs; five seeds are trained together. An aligned file: point `--data.path` to it.
    """
    return ExperimentConfig(
        name="mosei",
        data=MmsaConfig(dataset="mosei"),
        pipeline=PipelineConfig(batch_size=1024),
        optimizer=OptimizerConfig(clip_norm=None),
        train=TrainConfig(epochs=150, seeds=(1111, 1112, 1113, 1114, 1115)),
        evaluation=EvaluationConfig(metrics="mosi"),
        paper="Table 1, MAE / Corr / Acc-2 / F1: .547 / .756 / 85.6 / 85.5; aligned .547 / .758 / 85.7 / 85.6",
    )
