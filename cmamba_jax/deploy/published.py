"""Weights of PyTorch models: the Coupled Mamba of the paper's authors, and plain Mambas, one a modality.

The names and shapes are those of the state dicts of github.com/hustcselwb/coupled-mamba (both of its generations: one
stack of blocks that all modalities share, ``layers.*``, and one stack each, ``mamba_branches.*``) and of mamba_ssm's
``MixerModel`` with LayerNorm.
"""

import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cmamba_jax.config import ExperimentConfig, ModelConfig, PipelineConfig, TaskConfig
from cmamba_jax.data import DataInfo, Normalizer
from cmamba_jax.errors import UserError
from cmamba_jax.models import CoupledMamba
from cmamba_jax.models.encoders import MLP_HIDDEN
from cmamba_jax.train import state
from cmamba_jax.train.inference import Run

Tensors = Mapping[str, np.ndarray]

MODALITIES = ("audio", "vision", "text")
"""The order in which the published model stacks and concatenates its modalities."""


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads a state dict: .safetensors, or with PyTorch installed what `torch.save` wrote (tensors only, no code).

    Raises:
        UserError: the file is absent, damaged or needs PyTorch.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist; expected a state dict, .safetensors or .pt")
    try:
        if path.suffix == ".safetensors":
            from safetensors.numpy import load_file

            return load_file(path)
        import torch  # pyrefly: ignore

        loaded = torch.load(path, map_location="cpu", weights_only=True)
        return {name: tensor.float().numpy() for name, tensor in loaded.items()}
    except ImportError as error:
        raise UserError(
            f"{path} cannot be read without {error.name}: install it, or where PyTorch is save the state dict with "
            "safetensors.torch.save_file(model.state_dict(), 'model.safetensors')"
        ) from None
    except Exception as error:  # Whatever the two libraries raise.
        raise UserError(f"{path} cannot be read ({error}); expected a state dict, .safetensors or .pt") from error


def convert(tensors: Tensors) -> Run:
    """The published Coupled Mamba as our ``released`` model with ``block_norm="both"`` and the ``"mlp"`` encoder.

    The result computes what the published network computes. Modalities are audio, vision and text.

    Args:
        tensors: its state dict.

    Raises:
        UserError: a tensor is absent, has another shape, or stands for something that our model has not.
    """
    source = _Source(tensors)
    shared = "layers.0.mixer.in_proj.weight" in tensors
    stack = re.compile(r"layers\.(\d+)\." if shared else r"mamba_branches\.0\.(\d+)\.")
    n_layers = len({match[1] for match in map(stack.match, tensors) if match})
    if not n_layers:
        raise UserError("expected a state dict with layers.0.* or mamba_branches.0.0.*; is it a Coupled Mamba's?")
    first = "layers.0" if shared else "mamba_branches.0.0"
    encoder = "linear" if "audio_linear.fc.0.weight" in tensors else "projection"
    head = "regression" if "regression.dense.weight" in tensors else "regression_head"
    features = {m: source.shape(f"{m}_{encoder}.fc.0.weight", 2)[1] for m in MODALITIES}
    n_outputs, hidden = source.shape(f"{head}.out_proj.weight", 2)
    config = ModelConfig(
        **_sizes(source, first),
        n_layers=n_layers,
        coupling="released",
        block_norm="both",
        encoder="mlp",
        head_hidden=hidden,
    )
    f = config.d_model
    params = {
        "encoders": {m: _encoder(source, f"{m}_{encoder}.fc", features[m], f) for m in MODALITIES},
        "blocks": {
            i: _blocks(source, [f"layers.{i}" if shared else f"mamba_branches.{b}.{i}" for b in range(3)], config)
            | {"post_scale": source("norm_f.weight", f, times=3), "post_bias": source("norm_f.bias", f, times=3)}
            for i in range(n_layers)
        },
        "mixes": {
            i: {
                # Linear on the concatenation of the two others, in the order audio, vision, text.
                "kernel": source.stack([f"resnet_{m}.dense.weight" for m in MODALITIES], f, 2 * f)
                .transpose(0, 2, 1)
                .reshape(3, 2, f, f),
                "bias": source.stack([f"resnet_{m}.dense.bias" for m in MODALITIES], f),
            }
            for i in range(n_layers - 1)
        },
        "head": {
            "weights": _fusion(source),
            "hidden": source(f"{head}.dense.weight", hidden, f).T,
            "hidden_bias": source(f"{head}.dense.bias", hidden),
            "out": source(f"{head}.out_proj.weight", n_outputs, hidden).T,
            "out_bias": source(f"{head}.out_proj.bias", n_outputs),
        },
    }
    # Never used by the published forward pass.
    source.ignore(r"resnet_\w+\.out_proj\.\w+", r"weight_\w+", r"resnet\.\w+\.\w+")
    source.check_all_used()
    return _run("published", config, features, TaskConfig("regression", n_outputs), params)


def convert_mambas(checkpoints: Mapping[str, Tensors], *, task: TaskConfig = TaskConfig(), seed: int = 0) -> Run:  # noqa: B008
    """Plain Mambas, one a modality, as our ``independent`` model: blocks and final norm are theirs.

    Inputs are embeddings [L, d_model], which the encoders pass on unchanged; the head is new, so train it.

    Args:
        checkpoints: per modality the state dict of a ``MixerModel`` or of a language model that holds one as
            ``backbone``; embeddings and language-model heads are left out. All have the same sizes.
        task: what to predict.
        seed: of the head's parameters.

    Raises:
        UserError: see `convert`; or the models differ in size, or use RMSNorm.
    """
    prefix = {name: "backbone." if "backbone.norm_f.weight" in t else "" for name, t in checkpoints.items()}
    sources = {
        name: _Source({k.removeprefix(prefix[name]): v for k, v in tensors.items()}, name)
        for name, tensors in checkpoints.items()
    }
    shapes = []
    for source in sources.values():
        n_layers = len({m[1] for m in map(re.compile(r"layers\.(\d+)\.").match, source.tensors) if m})
        if not n_layers:
            raise UserError(f"{source.name}: expected a state dict with layers.0.*; is it a Mamba's?")
        if "layers.0.norm.bias" not in source.tensors:
            raise UserError(f"{source.name}: layers.0.norm.bias is absent: RMSNorm, where our model has LayerNorm")
        shapes.append(_sizes(source, "layers.0") | {"n_layers": n_layers})
    if any(shape != shapes[0] for shape in shapes):
        raise UserError(f"the checkpoints differ in size: {dict(zip(sources, shapes, strict=True))}; expected one size")
    config = ModelConfig(**shapes[0], coupling="independent")
    m, f = len(sources), config.d_model
    model = CoupledMamba(config, features=dict.fromkeys(sources, f), task=task, rngs=nnx.Rngs(seed))
    params = state.split_model(model)[1]
    blocks = []
    for i in range(config.n_layers):
        parts = [_blocks(source, [f"layers.{i}"], config) for source in sources.values()]
        blocks.append(jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts))
    params |= {
        "encoders": {name: {"kernel": np.eye(f, dtype=np.float32)[None], "bias": np.zeros(f)} for name in sources},
        "blocks": dict(enumerate(blocks)),
        "norm_scale": np.stack([source("norm_f.weight", f) for source in sources.values()]),
        "norm_bias": np.stack([source("norm_f.bias", f) for source in sources.values()]),
    }
    for source in sources.values():
        source.ignore(r"embedding\.weight", r"lm_head\.weight")
        source.check_all_used()
    assert len(params["norm_scale"]) == m
    return _run("mamba", config, dict.fromkeys(sources, f), task, params)


class _Source:
    """A state dict that checks shapes and remembers what was read."""

    def __init__(self, tensors: Tensors, name: str = "the state dict"):
        self.tensors, self.name = tensors, name
        self._rest = set(tensors)

    def __call__(self, name: str, *shape: int, times: int | None = None) -> np.ndarray:
        """The tensor as float32; with `times`, repeated on a new first axis."""
        if self.shape(name, len(shape)) != shape:
            raise UserError(f"{self.name}: {name} has shape {list(self.tensors[name].shape)}, expected {list(shape)}")
        self._rest.discard(name)
        values = np.asarray(self.tensors[name], np.float32)
        return values if times is None else np.stack([values] * times)

    def stack(self, names: list[str], *shape: int) -> np.ndarray:
        """Several tensors of one shape on a new first axis."""
        return np.stack([self(name, *shape) for name in names])

    def shape(self, name: str, rank: int) -> tuple[int, ...]:
        """The shape of a tensor that has to exist."""
        if name not in self.tensors:
            raise UserError(f"{self.name}: {name} is absent; it holds {', '.join(sorted(self.tensors)[:6])} ...")
        shape = tuple(self.tensors[name].shape)
        if len(shape) != rank:
            raise UserError(f"{self.name}: {name} has shape {list(shape)}, expected {rank} axes")
        return shape

    def ignore(self, *patterns: str) -> None:
        """Leaves tensors out whose whole name matches."""
        self._rest = {name for name in self._rest if not any(re.fullmatch(p, name) for p in patterns)}

    def check_all_used(self) -> None:
        """Raises UserError where a tensor has no counterpart in our model."""
        if self._rest:
            names = sorted(self._rest)
            raise UserError(f"{self.name}: {', '.join(names[:6])} ({len(names)} in all) have no counterpart here")


def _sizes(source: _Source, block: str) -> dict[str, int]:
    twice, f = source.shape(f"{block}.mixer.in_proj.weight", 2)
    d, n = source.shape(f"{block}.mixer.A_log", 2)
    k = source.shape(f"{block}.mixer.conv1d.weight", 3)[2]
    rank = source.shape(f"{block}.mixer.dt_proj.weight", 2)[1]
    if twice != 2 * d or d % f:
        raise UserError(f"{source.name}: in_proj has {twice} rows for d_model {f}, expected 2 x expand x d_model")
    return {"d_model": f, "expand": d // f, "d_state": n, "d_conv": k, "dt_rank": rank}


def _blocks(source: _Source, prefixes: list[str], config: ModelConfig) -> dict[str, Any]:
    """The parameters of one layer, stacked over the blocks with these prefixes."""
    f, n, k, r = config.d_model, config.d_state, config.d_conv, config.dt_rank or math.ceil(config.d_model / 8)
    d = config.expand * f

    def get(name: str, *shape: int) -> np.ndarray:
        return source.stack([f"{prefix}.{name}" for prefix in prefixes], *shape)

    return {
        "norm_scale": get("norm.weight", f),
        "norm_bias": get("norm.bias", f),
        "in_proj": get("mixer.in_proj.weight", 2 * d, f).transpose(0, 2, 1),
        "out_proj": get("mixer.out_proj.weight", f, d).transpose(0, 2, 1),
        "forward_ssm": {
            "conv_kernel": get("mixer.conv1d.weight", d, 1, k)[:, :, 0].transpose(0, 2, 1),
            "conv_bias": get("mixer.conv1d.bias", d),
            "select": get("mixer.x_proj.weight", r + 2 * n, d).transpose(0, 2, 1),
            "dt_up": get("mixer.dt_proj.weight", d, r).transpose(0, 2, 1),
            "dt_bias": get("mixer.dt_proj.bias", d),
            "A_log": get("mixer.A_log", d, n),
            "D": get("mixer.D", d),
        },
    }


def _encoder(source: _Source, prefix: str, n_features: int, f: int) -> dict[str, np.ndarray]:
    return {
        "kernel": source(f"{prefix}.0.weight", MLP_HIDDEN, n_features).T[None],
        "bias": source(f"{prefix}.0.bias", MLP_HIDDEN),
        "hidden_scale": source(f"{prefix}.1.weight", MLP_HIDDEN),
        "hidden_bias": source(f"{prefix}.1.bias", MLP_HIDDEN),
        "out": source(f"{prefix}.3.weight", f, MLP_HIDDEN).T,
        "out_bias": source(f"{prefix}.3.bias", f),
        "norm_scale": source(f"{prefix}.4.weight", f),
        "norm_bias": source(f"{prefix}.4.bias", f),
    }


def _fusion(source: _Source) -> np.ndarray:
    """Logits of the softmax over the modalities; the older generation divides raw weights by their sum instead."""
    raw = "weight_audio_inner" in source.tensors
    names = ("audio", "visual", "text")
    weights = source.stack([f"weight_{name}{'_inner' if raw else ''}" for name in names], 1)[:, 0]
    if not raw:
        return weights
    if (weights <= 0).any():
        raise UserError(f"{source.name}: fusion weights {weights.tolist()}; a softmax gives positive shares only")
    return np.log(weights)


def _run(name: str, config: ModelConfig, features: dict[str, int], task: TaskConfig, params: dict[str, Any]) -> Run:
    shapes = nnx.eval_shape(lambda: CoupledMamba(config, features=features, task=task, rngs=nnx.Rngs(0)))
    graphdef, like = state.split_model(shapes)
    params = jax.tree.map(lambda leaf, values: jnp.asarray(values, leaf.dtype).reshape(leaf.shape), like, params)
    names = () if task.kind == "regression" else tuple(str(k) for k in range(task.n_outputs))
    normalizer = Normalizer(
        {m: np.zeros(f, np.float32) for m, f in features.items()},
        {m: np.ones(f, np.float32) for m, f in features.items()},
    )
    experiment = ExperimentConfig(name, model=config, pipeline=PipelineConfig(normalize="none"))
    return Run(pathlib.Path(), experiment, DataInfo(features, task, names), normalizer, nnx.merge(graphdef, params), 0)
