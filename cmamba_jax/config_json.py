"""Configurations as JSON values, and the checks that types alone cannot make."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union

from cmamba_jax.config import ExperimentConfig
from cmamba_jax.errors import UserError

_AT_LEAST = {
    "model.d_model": 1,
    "model.expand": 1,
    "model.d_state": 1,
    "model.d_conv": 1,
    "model.dt_rank": 1,
    "model.n_layers": 0,
    "model.n_heads": 1,
    "model.frame": 1,
    "model.encoder_width": 1,
    "model.head_hidden": 1,
    "model.dropout": 0,
    "pipeline.batch_size": 1,
    "pipeline.eval_batch_size": 1,
    "optimizer.learning_rate": 0,
    "optimizer.weight_decay": 0,
    "optimizer.step_epochs": 1,
    "optimizer.warmup_epochs": 0,
    "optimizer.accumulate": 1,
    "train.epochs": 1,
    "train.label_smoothing": 0,
    "train.patience": 1,
    "train.checkpoint_every": 1,
    "train.keep_checkpoints": 1,
    "train.profile_steps": 0,
    "train.log_every": 1,
    "parallel.data": 0,
    "parallel.fsdp": 1,
    "parallel.tensor": 1,
    "parallel.sequence": 1,
    "parallel.num_processes": 1,
    "parallel.process_id": 0,
    "parallel.heartbeat_seconds": 1,
}
_BELOW = {"model.dropout": 1, "train.label_smoothing": 1, "optimizer.b1": 1, "optimizer.b2": 1}


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration (any nesting of its dataclasses) as JSON values.

    A field that may hold one of several dataclasses carries the name of its class under ``"type"``.

    Example:
        >>> from cmamba_jax.config import ExperimentConfig, SyntheticConfig
        >>> to_dict(ExperimentConfig("demo", SyntheticConfig(length=8)))["data"]["type"]
        'SyntheticConfig'
    """
    hints = typing.get_type_hints(type(config))
    return {f.name: _encode(getattr(config, f.name), hints[f.name]) for f in dataclasses.fields(config)}


def from_dict(cls: type, values: Mapping[str, Any], *, path: str = "") -> Any:
    """The inverse of `to_dict`; checks every name and type.

    Args:
        cls: dataclass to build, e.g. `ExperimentConfig`.
        values: what `to_dict` returned; missing fields take their defaults.
        path: prefix of the field names in error messages.

    Raises:
        UserError: an unknown field or a value of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in hints:
            close = difflib.get_close_matches(name, hints, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; {cls.__name__} has: {', '.join(hints)}"
            raise UserError(f"config: unknown field {path + name!r}{hint}")
    return cls(**{name: _decode(value, hints[name], path + name) for name, value in values.items()})


def check(config: ExperimentConfig) -> ExperimentConfig:
    """Returns the configuration if every value is possible.

    Raises:
        UserError: a value of the wrong type, outside its choices or its range.
    """
    from_dict(ExperimentConfig, to_dict(config))
    for bounds, fits, word in (
        (_AT_LEAST, lambda v, bound: v >= bound, ">="),
        (_BELOW, lambda v, bound: v < bound, "<"),
    ):
        for path, bound in bounds.items():
            section, name = path.split(".")
            value = getattr(getattr(config, section), name)
            if value is not None and not (math.isfinite(value) and fits(value, bound)):
                raise UserError(f"config: {path} has to be {word} {bound}, got {value}")
    if not config.name or "/" in config.name or config.name.startswith("."):
        raise UserError(f"config: name has to be a plain folder name, got {config.name!r}")
    return config


def _encode(value: Any, hint: Any) -> Any:
    if dataclasses.is_dataclass(value):
        classes = [c for c in typing.get_args(hint) if dataclasses.is_dataclass(c)]
        return ({"type": type(value).__name__} if classes else {}) | to_dict(value)
    return list(value) if isinstance(value, tuple) else value


def _decode(value: Any, hint: Any, path: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return _decode_union(value, args, path)
    if origin is Literal:
        if value not in args:
            close = difflib.get_close_matches(str(value), map(str, args), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise UserError(f"config: {path} has to be one of {', '.join(map(str, args))}, got {value!r}{hint}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"config: {path} has to be a list, got {value!r}")
        return tuple(_decode(item, args[0], f"{path}[{i}]") for i, item in enumerate(value))
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise UserError(f"config: {path} has to be a {hint.__name__}, got {value!r}")
        return from_dict(hint, value, path=path + ".")
    accepted = {float: (int, float), type(None): (type(None),)}.get(hint, (hint,))
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"config: {path} has to be of type {hint.__name__}, got {value!r}")
    return value


def _decode_union(value: Any, choices: tuple[Any, ...], path: str) -> Any:
    if value is None and type(None) in choices:
        return None
    classes = {c.__name__: c for c in choices if dataclasses.is_dataclass(c)}
    if classes:
        name = value.get("type") if isinstance(value, Mapping) else None
        if name not in classes:
            raise UserError(f"config: {path} has to be one of {', '.join(classes)}, got {value!r}")
        return from_dict(classes[name], {k: v for k, v in value.items() if k != "type"}, path=path + ".")
    (hint,) = (c for c in choices if c is not type(None))
    return _decode(value, hint, path)
