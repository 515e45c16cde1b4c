"""What an experiment amounts to, before it runs: `cmamba info`."""

import math
from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels
from cmamba_jax.config import ExperimentConfig
from cmamba_jax.config_json import check, to_dict
from cmamba_jax.data import Pipeline
from cmamba_jax.models.flops import forward_flops
from cmamba_jax.models.size import abstract_params, count
from cmamba_jax.train.experiment import load_splits, resolve
from pallas_kernels.coupled_scan.types import Full, Independent, Problem, Shared


def describe(config: ExperimentConfig) -> dict[str, Any]:
    """The resolved configuration, the data, parameters, FLOPs and scan of an experiment, as JSON values.

    Raises:
        UserError: the configuration is wrong.
        DataError: the data is not as expected.
    """
    check(config)
    splits = load_splits(config)
    info = splits.info
    config = resolve(config, info)
    pipeline = Pipeline(splits, config.pipeline, seed=config.train.seed)
    length = next(iter(next(pipeline.train()).inputs.values())).shape[1]
    params = abstract_params(config.model, info.features, info.task)
    flops = forward_flops(config.model, info.features, info.task, length)
    return {
        "config": to_dict(config),
        "data": {
            "samples": {name: len(getattr(splits, name)) for name in ("train", "valid", "test")},
            "features": dict(info.features),
            "labels": list(info.label_names),
            "length": int(length),
            "steps_per_epoch": pipeline.steps_per_epoch,
        },
        "parameters": {"total": count(params), **{name: count(part) for name, part in params.items()}},
        "flops_per_sample": {"total": sum(flops.values()), **flops},
        "scan": _scan(config, len(info.features), math.ceil(length / config.model.frame)),
    }


def _scan(config: ExperimentConfig, m: int, length: int) -> dict[str, str]:
    """The implementation that the model's scans take on this device, and why."""
    model = config.model
    if model.coupling == "cross_attention" or model.n_layers == 0:
        return {"implementation": "none", "reason": "the model has no scan"}
    m = 1 if model.early_fusion != "none" else m
    b, d, n = config.pipeline.batch_size, model.expand * model.d_model, model.d_state

    def problem() -> Problem:
        sequence, selected = jnp.zeros((m, b, length, d), model.compute_dtype), jnp.zeros((m, b, length, n))
        coupling = {"shared": Shared(jnp.zeros((m, n))), "full": Full(jnp.zeros((m, m)))}
        return Problem(
            x=sequence,
            dt=sequence,
            A=jnp.zeros((m, d, n)),
            B=selected.astype(sequence.dtype),
            C=selected.astype(sequence.dtype),
            coupling=coupling.get(model.coupling, Independent()),
            D=jnp.zeros((m, d)),
            z=sequence,
            dt_bias=jnp.zeros((m, d)),
            mask=jnp.ones((m, b, length), bool),
            readout=model.readout,
        )

    shapes = jax.eval_shape(problem)
    if model.scan is None:
        choice = pallas_kernels.choose_implementation(shapes)
        return {"implementation": choice.name, "reason": choice.reason}
    known = pallas_kernels.implementations()
    if model.scan not in known:
        raise pallas_kernels.UnsupportedError(f"model.scan: unknown {model.scan!r}; known: {', '.join(known)}")
    why_not = known[model.scan].unsupported(shapes, jax.default_backend())
    return {"implementation": model.scan, "reason": f"cannot run here: {why_not}" if why_not else "set by model.scan"}
