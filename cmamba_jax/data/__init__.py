"""Data: from files or arrays to batches of one static shape.

``load(config)`` gives the splits of a data set and ``from_arrays`` those of arrays in memory; ``Pipeline``
turns splits into batches. Names are imported on first use, because the builders and the pipeline need
tensorflow-datasets and grain.
"""

import importlib
import typing

if typing.TYPE_CHECKING:
    from cmamba_jax.data.checks import DataError
    from cmamba_jax.data.dataset import DataInfo, Sample, Splits, from_arrays, load
    from cmamba_jax.data.pipeline import Pipeline
    from cmamba_jax.data.transforms import Normalizer

__all__ = ["DataError", "DataInfo", "Normalizer", "Pipeline", "Sample", "Splits", "from_arrays", "load"]

_HOMES = {
    "DataError": "checks",
    "DataInfo": "dataset",
    "Normalizer": "transforms",
    "Pipeline": "pipeline",
    "Sample": "dataset",
    "Splits": "dataset",
    "from_arrays": "dataset",
    "load": "dataset",
}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
