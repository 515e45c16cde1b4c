"""Coupled Mamba in JAX: fusing modalities with coupled state-space chains.

The names below are imported on first use, so that ``import cmamba_jax`` costs next to nothing.
"""

import importlib
import typing

if typing.TYPE_CHECKING:
    from cmamba_jax.batch import Batch
    from cmamba_jax.config import (
        AugmentConfig,
        EvaluationConfig,
        ExperimentConfig,
        MissingConfig,
        MmImdbConfig,
        MmsaConfig,
        ModelConfig,
        MosiContextualConfig,
        NpzConfig,
        OmicsConfig,
        OptimizerConfig,
        ParallelConfig,
        PipelineConfig,
        SyntheticConfig,
        TaskConfig,
        TrainConfig,
        WatchConfig,
    )
    from cmamba_jax.data import Pipeline, Splits, from_arrays
    from cmamba_jax.errors import UserError
    from cmamba_jax.models import CoupledMamba
    from cmamba_jax.train import RunResult, SeedsResult, cross_validate, fit, fit_seeds, load_run

__version__ = "0.1.0.dev0"

_HOMES = {
    "batch": ("Batch",),
    "config": (
        "AugmentConfig",
        "EvaluationConfig",
        "ExperimentConfig",
        "MissingConfig",
        "MmImdbConfig",
        "MmsaConfig",
        "ModelConfig",
        "MosiContextualConfig",
        "NpzConfig",
        "OmicsConfig",
        "OptimizerConfig",
        "ParallelConfig",
        "PipelineConfig",
        "SyntheticConfig",
        "TaskConfig",
        "TrainConfig",
        "WatchConfig",
    ),
    "data": ("Pipeline", "Splits", "from_arrays"),
    "errors": ("UserError",),
    "models": ("CoupledMamba",),
    "train": ("RunResult", "SeedsResult", "cross_validate", "fit", "fit_seeds", "load_run"),
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "AugmentConfig",
    "Batch",
    "CoupledMamba",
    "EvaluationConfig",
    "ExperimentConfig",
    "MissingConfig",
    "MmImdbConfig",
    "MmsaConfig",
    "ModelConfig",
    "MosiContextualConfig",
    "NpzConfig",
    "OmicsConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "Pipeline",
    "PipelineConfig",
    "RunResult",
    "SeedsResult",
    "Splits",
    "SyntheticConfig",
    "TaskConfig",
    "TrainConfig",
    "UserError",
    "WatchConfig",
    "cross_validate",
    "fit",
    "fit_seeds",
    "from_arrays",
    "load_run",
]


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
