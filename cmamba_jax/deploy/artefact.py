"""A model as a StableHLO artefact: it runs with JAX alone, without this package, on CPU, CUDA and TPU."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import export

from cmamba_jax.batch import Batch
from cmamba_jax.errors import UserError
from cmamba_jax.models import CoupledMamba
from cmamba_jax.train import runs, state
from cmamba_jax.train.inference import Run

PLATFORMS = ("cpu", "cuda", "tpu")
FILE, SIGNATURE = "model.stablehlo", "signature.json"


def save(run: Run, folder: str | os.PathLike, *, length: int, platforms: Sequence[str] = PLATFORMS) -> pathlib.Path:
    """Writes FOLDER/model.stablehlo, made by `jax.export`, and FOLDER/signature.json, which describes it.

    The artefact takes ``inputs``, modality -> float32 [B, length, F], raw as in training, and ``masks``, modality ->
    bool [B, length], False at padding and where a modality is missing, and returns logits float32 [B, K] or
    [B, length, K]. B is free. ``jax.export.deserialize(bytes).call(inputs, masks)`` runs it.

    Args:
        run: the trained model.
        folder: made where it does not exist.
        length: L of the sequences; shorter ones are padded and masked.
        platforms: of "cpu", "cuda", "rocm" and "tpu"; none of them needs to be here.

    Returns:
        The folder.

    Raises:
        UserError: the length or a platform is wrong.
    """
    if length < 1 or not platforms or not set(platforms) <= {*PLATFORMS, "rocm"}:
        raise UserError(
            f"length={length}, platforms={list(platforms)}: expected length >= 1, of {', '.join(PLATFORMS)}"
        )
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (batch,) = export.symbolic_shape("batch")
    features = run.model.features
    inputs = {name: jax.ShapeDtypeStruct((batch, length, f), jnp.float32) for name, f in features}
    masks = {name: jax.ShapeDtypeStruct((batch, length), jnp.bool_) for name, _ in features}
    exported = export.export(jax.jit(predict_function(run)), platforms=list(platforms))(inputs, masks)
    temporary = folder / (FILE + ".tmp")
    try:
        temporary.write_bytes(exported.serialize())
    except ImportError:
        raise UserError('flatbuffers is not installed; pip install "cmamba-jax[hub]"') from None
    temporary.replace(folder / FILE)
    task = run.info.task
    runs.write_json(
        folder / SIGNATURE,
        {
            "inputs": {name: {"shape": ["batch", length, f], "dtype": "float32"} for name, f in features},
            "masks": {name: {"shape": ["batch", length], "dtype": "bool"} for name, _ in features},
            "logits": {"shape": ["batch", *([length] if task.per == "step" else []), task.n_outputs]},
            "task": dataclasses.asdict(task),
            "label_names": list(run.info.label_names),
            "platforms": list(platforms),
            "calling_convention_version": exported.calling_convention_version,
            "jax": jax.__version__,
        },
    )
    return folder


def predict_function(run: Run) -> Callable[[dict[str, Any], dict[str, Any]], jax.Array]:
    """``predict(inputs, masks) -> logits`` with the parameters and the scaling inside; see `save`."""
    # The scan that every platform has; kernels are bound to the one that they were made for.
    config = dataclasses.replace(run.config.model, scan="xla")
    shapes = nnx.eval_shape(
        lambda: CoupledMamba(config, features=run.info.features, task=run.info.task, rngs=nnx.Rngs(0))
    )
    graphdef, params = state.split_model(shapes)[0], run.params
    offset, scale = run.normalizer.offset, run.normalizer.scale

    def predict(inputs: dict[str, Any], masks: dict[str, Any]) -> jax.Array:
        scaled = {name: (values - offset[name]) / scale[name] for name, values in inputs.items()}
        return nnx.merge(graphdef, params)(Batch(inputs=scaled, mask=masks)).logits

    return predict
