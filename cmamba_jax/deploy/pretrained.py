"""A trained model as a folder that can be shared: config.json and model.safetensors."""

import os
import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

import cmamba_jax
from cmamba_jax import config_json
from cmamba_jax.config import ExperimentConfig, TaskConfig
from cmamba_jax.data import DataInfo, Normalizer
from cmamba_jax.errors import UserError
from cmamba_jax.models import CoupledMamba
from cmamba_jax.train import runs, state
from cmamba_jax.train.inference import Run, load_run

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
_FORMAT = 1


def save(run: Run, folder: str | os.PathLike, *, dtype: Literal["float32", "bfloat16"] | None = None) -> pathlib.Path:
    """Writes FOLDER/config.json and FOLDER/model.safetensors.

    Args:
        run: the trained model, from `load_run`, `load` or `published.convert`.
        folder: made where it does not exist; the two files are replaced.
        dtype: of the stored parameters; None: as they are. bfloat16 halves the file and rounds the parameters.

    Returns:
        The folder.
    """
    safetensors = _safetensors()
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(zip(state.parameter_names(run.params), jax.tree.leaves(run.params), strict=True))
    if dtype is not None:
        tensors = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    temporary = folder / (WEIGHTS + ".tmp")
    temporary.write_bytes(safetensors.save(tensors, metadata={"format": "flax", "library": "cmamba-jax"}))
    temporary.replace(folder / WEIGHTS)
    runs.write_json(folder / CONFIG, to_config(run))
    return folder


def to_config(run: Run) -> dict[str, Any]:
    """The content of config.json: everything but the parameters, as JSON values."""
    report = run.run_dir / "report" / "metrics.json"
    return {
        "model_type": "coupled-mamba",
        "format": _FORMAT,
        "cmamba_jax": cmamba_jax.__version__,
        "experiment": _without_folders(config_json.to_dict(run.config)),
        "features": dict(run.info.features),
        "task": config_json.to_dict(run.info.task),
        "label_names": list(run.info.label_names),
        "normalizer": run.normalizer.to_dict(),
        "epoch": run.epoch,
        "metrics": runs.read_json(report) if report.exists() else run.metrics,
    }


def load(folder: str | os.PathLike) -> Run:
    """Loads what `save` wrote; every parameter is equal to the bit and keeps its dtype.

    Raises:
        UserError: a file is absent or damaged, or the parameters are not those of the configuration.
    """
    folder = pathlib.Path(folder).expanduser()
    config, values = _read_config(folder), _safetensors()
    try:
        tensors = values.load_file(folder / WEIGHTS)
    except FileNotFoundError:
        raise UserError(
            f"{folder / WEIGHTS} does not exist; export the run again, or download the whole folder"
        ) from None
    except Exception as error:  # The library's own class, which its submodules do not export.
        raise UserError(f"{folder / WEIGHTS} cannot be read ({error}); export the run again") from error
    experiment = config_json.from_dict(ExperimentConfig, config["experiment"], path="experiment.")
    task = config_json.from_dict(TaskConfig, config["task"], path="task.")
    info = DataInfo(config["features"], task, tuple(config["label_names"]))
    shapes = nnx.eval_shape(lambda: CoupledMamba(experiment.model, features=info.features, task=task, rngs=nnx.Rngs(0)))
    graphdef, like = state.split_model(shapes)
    names = state.parameter_names(like)
    expected = {name: leaf.shape for name, leaf in zip(names, jax.tree.leaves(like), strict=True)}
    for name in expected | tensors:
        there = tensors[name].shape if name in tensors else "absent"
        if there != expected.get(name, "absent"):
            raise UserError(
                f"{folder / WEIGHTS}: parameter {name} is {there}, expected {expected.get(name, 'absent')} by "
                f"{CONFIG}; the two files belong to different models"
            )
    params = jax.tree.unflatten(jax.tree.structure(like), [jnp.asarray(tensors[name]) for name in names])
    normalizer = Normalizer.from_dict(config["normalizer"])
    return Run(folder, experiment, info, normalizer, nnx.merge(graphdef, params), config["epoch"], config["metrics"])


def load_model(path: str | os.PathLike, *, which: str = "best") -> Run:
    """Loads a run folder, or a folder that `save` wrote.

    Args:
        path: of the folder.
        which: for a run folder, its "best" or its "last" checkpoint.

    Raises:
        UserError: the folder is neither.
    """
    if (pathlib.Path(path).expanduser() / WEIGHTS).exists():
        return load(path)
    return load_run(path, which=which)


def _without_folders(values: Any) -> Any:
    """Keeps of each absolute path its last part alone: folders of one machine are no business of another's."""
    if isinstance(values, dict):
        return {name: _without_folders(value) for name, value in values.items()}
    return pathlib.Path(values).name if isinstance(values, str) and os.path.isabs(values) else values


def _read_config(folder: pathlib.Path) -> dict[str, Any]:
    config = runs.read_json(folder / CONFIG)
    if not isinstance(config, dict) or config.get("model_type") != "coupled-mamba":
        raise UserError(f"{folder / CONFIG} is none of an exported model; expected what `cmamba export` writes")
    if config.get("format") != _FORMAT:
        raise UserError(
            f"{folder / CONFIG} has format {config.get('format')}, expected {_FORMAT}; use the cmamba_jax that wrote "
            f"it, {config.get('cmamba_jax')}"
        )
    return config


def _safetensors() -> Any:
    try:
        import safetensors.flax
    except ImportError:
        raise UserError('safetensors is not installed; pip install "cmamba-jax[hub]"') from None
    return safetensors.flax
