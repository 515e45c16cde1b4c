"""Training, checkpoints, inference and reports.

``fit(config)`` runs an experiment from data to report, ``load_run(run_dir)`` loads its result. Names are imported on
first use.
"""

import importlib
import typing

if typing.TYPE_CHECKING:
    from cmamba_jax.train.crossval import CrossValidation, cross_validate
    from cmamba_jax.train.experiment import RunResult, fit
    from cmamba_jax.train.inference import Prediction, Run, load_run
    from cmamba_jax.train.seeds import SeedsResult, fit_seeds

__all__ = [
    "CrossValidation",
    "Prediction",
    "Run",
    "RunResult",
    "SeedsResult",
    "cross_validate",
    "fit",
    "fit_seeds",
    "load_run",
]

_HOMES = {
    "CrossValidation": "crossval",
    "Prediction": "inference",
    "Run": "inference",
    "RunResult": "experiment",
    "SeedsResult": "seeds",
    "cross_validate": "crossval",
    "fit": "experiment",
    "fit_seeds": "seeds",
    "load_run": "inference",
}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
