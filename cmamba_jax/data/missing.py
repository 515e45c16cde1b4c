"""Missing data: removes part of a sample's inputs at random.

Three kinds, whose scores cannot be compared with each other:

- "element": every number of every modality is zero with probability `rate`. This is what Table 12 of the Coupled Mamba
  paper does: most of each feature vector is still there.
- "modality": every modality of a sample is gone as a whole with probability `rate`, but for one that always stays:
  of M modalities, a share rate - rate^M / M of each is gone. This is what papers on missing modalities mean.
- "step": every time step of every modality is gone with probability `rate`, as in MMSA (TFR-Net). MMSA removes words
  before BERT (they become the token UNK; the first and the last stay); here the features of the steps are removed.
"""

from collections.abc import Mapping

import numpy as np

from cmamba_jax.config import MissingConfig
from cmamba_jax.data.checks import DataError
from cmamba_jax.data.dataset import DataInfo, Sample


def check(config: MissingConfig, info: DataInfo) -> None:
    """Makes sure that a configuration is possible and fits the data.

    Raises:
        DataError: it is not or does not.
    """
    if not 0 <= config.rate <= 1:
        raise DataError(f"missing.rate is {config.rate}, expected a probability, 0 to 1")
    if config.rate and config.kind == "none":
        raise DataError(f"missing.rate is {config.rate}, but missing.kind is none; set it to element, modality or step")
    if unknown := [name for name in config.modalities if name not in info.features]:
        raise DataError(f"missing.modalities holds {', '.join(unknown)}; the data has {', '.join(info.features)}")


def remove(sample: Sample, config: MissingConfig, rng: np.random.Generator) -> Sample:
    """Removes what `config` says, zero in the inputs and, unless ``marking`` is "zeros", False in the masks.

    Drawn from the same state of `rng`, what is missing at a lower rate is missing at a higher one too. Labels per step
    count as before.

    Args:
        sample: complete and normalised (a zero stands for the mean of a feature, or its minimum).
        config: kind, rate, modalities and marking.
        rng: source of the random numbers; the seed of the configuration is not read.
    """
    if config.kind == "none" or not config.rate:
        return sample
    may_go = config.modalities or tuple(sample["inputs"])
    if config.kind == "element":
        # Drawn for all modalities, so that a choice among them does not change what the others lose.
        draws = {name: rng.uniform(size=values.shape) for name, values in sample["inputs"].items()}
        inputs = {
            name: np.where((draws[name] < config.rate) & (name in may_go), np.float32(0), values)
            for name, values in sample["inputs"].items()
        }
        return {**sample, "inputs": inputs}
    masks = sample["mask"]
    if config.kind == "modality":
        kept = {name: np.full(len(masks[name]), stays) for name, stays in _stay(masks, may_go, config, rng).items()}
    else:
        kept = {
            name: rng.uniform(size=len(mask)) >= (config.rate if name in may_go else 0) for name, mask in masks.items()
        }
    result: Sample = {
        **sample,
        "inputs": {name: np.where(kept[name][:, None], x, np.float32(0)) for name, x in sample["inputs"].items()},
    }
    if config.marking == "mask":
        result["mask"] = {name: mask & kept[name] for name, mask in masks.items()}
    return result


def _stay(
    masks: Mapping[str, np.ndarray], may_go: tuple[str, ...], config: MissingConfig, rng: np.random.Generator
) -> dict[str, bool]:
    """Which modalities stay. Where all that exist would go, the one that would go at the highest rate only stays."""
    draws = {name: rng.uniform() if name in may_go else rng.uniform() + 1 for name in masks}
    exist = {name: draw for name, draw in draws.items() if masks[name].any()}
    last = max(exist, key=lambda name: exist[name])
    return {name: draw >= config.rate or name == last for name, draw in draws.items()}
