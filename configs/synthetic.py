"""Cued recall: the label needs both modalities at different times, so that fusion late in the model cannot solve it."""

from cmamba_jax.config import (
    ExperimentConfig,
    ModelConfig,
    OptimizerConfig,
    PipelineConfig,
    SyntheticConfig,
    TrainConfig,
)


def config() -> ExperimentConfig:
    """A small model that solves it; with `--model.coupling independent --model.fusion late` it stays at chance."""
    return ExperimentConfig(
        name="synthetic",
        data=SyntheticConfig(),
        model=ModelConfig(d_model=32, d_state=16, n_layers=1, pooling="mean"),
        pipeline=PipelineConfig(batch_size=64),
        optimizer=OptimizerConfig(name="adamw", learning_rate=3e-3, weight_decay=0.01, schedule="cosine"),
        train=TrainConfig(epochs=10, monitor="accuracy"),
    )
