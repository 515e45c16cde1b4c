"""A tiny experiment on synthetic data and its finished run, for the tests of training and the command line."""

import atexit
import contextlib
import dataclasses
import functools
import shutil
import tempfile

import jax
import jaxtyping

from cmamba_jax.config import (
    ExperimentConfig,
    ModelConfig,
    OptimizerConfig,
    PipelineConfig,
    SyntheticConfig,
    TrainConfig,
)
from cmamba_jax.train import RunResult, fit

TINY = ExperimentConfig(
    name="tiny",
    data=SyntheticConfig(n_train=24, n_valid=8, n_test=12, length=8, n_classes=2),
    model=ModelConfig(d_model=4, d_state=2, n_layers=1, head_hidden=4, dropout=0.1, scan="reference"),
    pipeline=PipelineConfig(batch_size=8, eval_batch_size=8),
    optimizer=OptimizerConfig(learning_rate=0.01),
    train=TrainConfig(epochs=3, log_every=2),
)


@contextlib.contextmanager
def quick_compilation():
    """Halves the time that XLA takes; for tests where the speed of the result does not matter."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


@contextlib.contextmanager
def symbolic_sizes():
    """Admits sizes that are no int, as an exported model has; the type checks of the tests would not."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@functools.cache
def run() -> RunResult:
    """One run a session; its folder goes with the process."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    with quick_compilation():
        return fit(dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, output=folder)))
