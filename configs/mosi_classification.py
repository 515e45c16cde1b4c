"""Negative, neutral or positive utterances (CMU-MOSI, MMSA's file); `cmamba train` needs `--data.path`."""

from cmamba_jax.config import (
    EvaluationConfig,
    ExperimentConfig,
    MmsaConfig,
    OptimizerConfig,
    PipelineConfig,
    TrainConfig,
)


def config() -> ExperimentConfig:
    """Negative, neutral or positive; cross entropy. `--data.dataset mosei` and `sims` are Tables 3 and 4."""
    return ExperimentConfig(
        name="mosi_classification",
        data=MmsaConfig(dataset="mosi", task="classification"),
        pipeline=PipelineConfig(batch_size=128),
        optimizer=OptimizerConfig(clip_norm=None),
        train=TrainConfig(epochs=150, loss="cross_entropy", seeds=(1111, 1112, 1113, 1114, 1115)),
        evaluation=EvaluationConfig(metrics="mmsa_classification"),
        paper="Table 13, Acc-2 / Acc-3 / F1 / F1-3: 53.76 / 78.59 / 49.21 / 76.76 (Acc-2: mmsa_non0_acc2)",
    )
