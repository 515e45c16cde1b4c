"""Numbers of parameters, and models of equal numbers, so that a comparison is one of architectures."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from cmamba_jax.config import ModelConfig, TaskConfig
from cmamba_jax.errors import UserError
from cmamba_jax.models.coupled_mamba import CoupledMamba

TOLERANCE = 0.05
"""Share by which models of "equal" size may differ."""


def abstract_params(config: ModelConfig, features: Mapping[str, int], task: TaskConfig) -> dict[str, Any]:
    """Shapes and dtypes of a model's parameters, a pure dict as `train.state.split_model` returns; nothing is computed.

    Args:
        config: the model.
        features: width F of each modality.
        task: the task.
    """
    model = nnx.eval_shape(lambda: CoupledMamba(config, features=features, task=task, rngs=nnx.Rngs(0)))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def count(params: Any) -> int:
    """Number of values in a pytree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def match_width(
    config: ModelConfig, features: Mapping[str, int], task: TaskConfig, parameters: int, *, tolerance: float = TOLERANCE
) -> ModelConfig:
    """Chooses `d_model` so that a model has a given number of parameters; all else stays as it is.

    The widths of an attention are coarse, since its heads divide them: where none meets the number, those between two
    of them are tried, with fewer heads, and the width of the MLP (`expand`).

    Example:
        >>> from cmamba_jax.config import ModelConfig, TaskConfig
        >>> features, task = {"text": 20, "audio": 10}, TaskConfig()
        >>> target = count(abstract_params(ModelConfig(d_model=16, d_state=4), features, task))
        >>> config = ModelConfig(coupling="cross_attention", d_state=4)
        >>> config = match_width(config, features, task, target)
        >>> abs(count(abstract_params(config, features, task)) / target - 1) < 0.05
        True

    Args:
        config: the model whose width is chosen.
        features: width F of each modality.
        task: the task.
        parameters: the number to meet.
        tolerance: largest relative difference.

    Raises:
        UserError: no width meets it.
    """
    grain = config.n_heads if config.coupling == "cross_attention" else 1

    def at(width: int, **changes: Any) -> tuple[ModelConfig, int]:
        sized = dataclasses.replace(config, d_model=width, **changes)
        return sized, count(abstract_params(sized, features, task))

    def difference(pair: tuple[ModelConfig, int]) -> float:
        return abs(pair[1] / parameters - 1)

    # The number grows with the width: bracket it, then halve.
    low, high = 1, 2
    while at(high * grain)[1] < parameters:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle * grain)[1] < parameters else (low, middle)
    best = min((at(low * grain), at(high * grain)), key=difference)
    if difference(best) > tolerance and grain > 1:
        widths = range(low * grain, high * grain + 1)
        heads = {width: max(n for n in range(1, grain + 1) if width % n == 0) for width in widths}
        best = min(
            (at(w, n_heads=heads[w], expand=e) for w in widths for e in range(1, 2 * config.expand + 1)), key=difference
        )
    sized, found = best
    if difference(best) > tolerance:
        raise UserError(
            f"no d_model gives this model {parameters:,} parameters within {tolerance:.0%}: {sized.d_model} gives "
            f"{found:,}; choose a larger model to compare with, or fewer n_heads"
        )
    return sized
