"""Trained models at work: live streams, sharing, artefacts without this package, published weights.

Names are imported on first use.
"""

import importlib
import typing

if typing.TYPE_CHECKING:
    from cmamba_jax.deploy.hub import PretrainedModel
    from cmamba_jax.deploy.pretrained import load_model
    from cmamba_jax.deploy.streaming import Answer, StreamingSession

__all__ = ["Answer", "PretrainedModel", "StreamingSession", "load_model"]

_HOMES = {
    "Answer": "streaming",
    "PretrainedModel": "hub",
    "StreamingSession": "streaming",
    "load_model": "pretrained",
}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
