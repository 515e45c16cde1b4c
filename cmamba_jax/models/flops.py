"""Floating-point operations of a forward pass, counted from the configuration."""

import math
from collections.abc import Mapping

from cmamba_jax.config import ModelConfig, TaskConfig
from cmamba_jax.models.encoders import MLP_HIDDEN


def forward_flops(config: ModelConfig, features: Mapping[str, int], task: TaskConfig, length: int) -> dict[str, int]:
    """Operations of the forward pass of one sample, by part of the model; a multiply-add counts as two.

    Matrix products, convolutions and the scan are counted; norms, activations, exponentials and pooling, which are
    of lower order, are not. The scan is counted as its sequential form (Eq. 5, 6): for every modality, step, channel
    and state dt A, (dt x) B, a h + u and the readout C h are six operations, to which a coupling adds the sum over
    the modalities, one for ``shared``, 2 M for ``full``. Parallel implementations do more.

    Args:
        config: the model.
        features: width F of each modality.
        task: the task; predictions per step apply the head at every step.
        length: samples L.

    Returns:
        Operations of "encoders", "early fusion", "projections" (in, selection, dt and out; for ``cross_attention``
        those of the attention and the MLP), "convolution", "scan", "attention", "layer coupling" (of ``released``)
        and "head".

    Example:
        >>> from cmamba_jax.config import ModelConfig, TaskConfig
        >>> flops = forward_flops(ModelConfig(), {"text": 768, "audio": 74, "vision": 35}, TaskConfig(), length=50)
        >>> flops["encoders"] == 2 * 50 * (768 + 74 + 35) * 128
        True
    """
    m, f, length = len(features), config.d_model, math.ceil(length / config.frame)
    taps = config.encoder_width if config.encoder == "conv" else 1
    width, second = (MLP_HIDDEN, m * f) if config.encoder == "mlp" else (f, 0)
    encoders = 2 * length * width * (taps * config.frame * sum(features.values()) + second)
    early = 2 * m * length * f * f if config.early_fusion == "concat" else 0
    if config.early_fusion != "none":
        m = 1
    fused = f * (m if config.fusion == "concat" else 1)
    heads = (m if config.fusion == "late" else 1) * (length if task.per == "step" else 1)
    layers = _attention_flops if config.coupling == "cross_attention" else _mamba_flops
    return {
        "encoders": encoders,
        "early fusion": early,
        **layers(config, m, length),
        "head": 2 * heads * (fused * config.head_hidden + config.head_hidden * task.n_outputs),
    }


def _mamba_flops(config: ModelConfig, m: int, length: int) -> dict[str, int]:
    f = config.d_model
    d, n = config.expand * f, config.d_state
    rank = config.dt_rank or math.ceil(f / 8)
    directions = 2 if config.direction == "bidirectional" else 1
    steps = m * length * config.n_layers
    coupled = {"shared": 1, "full": 2 * m}.get(config.coupling, 0)
    mixes = max(config.n_layers - 1, 0) if config.coupling == "released" else 0
    return {
        "projections": 2 * steps * (f * 2 * d + directions * d * (rank + 2 * n) + directions * rank * d + d * f),
        "convolution": 2 * steps * directions * config.d_conv * d,
        "scan": (6 + coupled) * steps * directions * d * n,
        "attention": 0,
        "layer coupling": 2 * mixes * length * m * (m - 1) * f * f,
    }


def _attention_flops(config: ModelConfig, m: int, length: int) -> dict[str, int]:
    f, steps = config.d_model, m * length * config.n_layers
    return {
        "projections": 2 * steps * (4 * m * f * f + 2 * f * config.expand * f),
        "convolution": 0,
        "scan": 0,
        "attention": 2 * 2 * steps * m * length * f,
        "layer coupling": 0,
    }
