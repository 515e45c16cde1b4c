"""Seven shoulder exercises from the accelerometer and the gyroscope of a smart watch, on people not seen before."""

from cmamba_jax.config import (
    AugmentConfig,
    ExperimentConfig,
    ModelConfig,
    OptimizerConfig,
    PipelineConfig,
    TrainConfig,
    WatchConfig,
)


def config() -> ExperimentConfig:
    """Windows of 2 s every second; five folds by person (`cmamba crossval` runs them all)."""
    return ExperimentConfig(
        name="watch",
        data=WatchConfig(window=100, stride=50),
        # Four samples make a step: 12.5 steps a second are enough for these movements, and a quarter of the work.
        model=ModelConfig(
            d_model=32,
            d_state=16,
            n_layers=2,
            frame=4,
            encoder="conv",
            encoder_width=3,
            pooling="mean",
            fusion="concat",
            dropout=0.1,
        ),
        # People differ in speed, in how tight the strap is and in the arm that wears the watch.
        pipeline=PipelineConfig(
            batch_size=64,
            augment=AugmentConfig(jitter=0.05, scale=0.15, rotation=30.0, time_warp=0.25, mirror=(-1, 1, 1, 1, -1, -1)),
        ),
        optimizer=OptimizerConfig(
            name="adamw", learning_rate=2e-3, weight_decay=0.05, schedule="cosine", warmup_epochs=1.0
        ),
        train=TrainConfig(epochs=12, monitor="accuracy", label_smoothing=0.1),
    )
