"""Cued recall: a task whose label needs both modalities, at different times.

The cue is one pulse at a random time; the symbols are shown every `SPACING` steps; the label is the symbol
shown `delay` steps after the pulse. The symbols are a random order of a multiset that holds every class
equally often, and every one of them is cued with the same probability. So P(label | cue) and
P(label | symbols) are exactly uniform, and because the cross entropy of a sum of logits
f(cue) + g(symbols) is convex, its optimum is chance as well: only a model that joins the two can do better.
"""

import numpy as np

from cmamba_jax.config import SyntheticConfig, TaskConfig
from cmamba_jax.data.checks import DataError
from cmamba_jax.data.dataset import DataInfo, Sample, Splits

SPACING = 3
"""Steps from one symbol to the next."""


def load(config: SyntheticConfig) -> Splits:
    """Describes the task; sample i of a split is generated when it is indexed.

    Args:
        config: sizes, length, classes, delay, noise and seed.

    Returns:
        Splits of modalities 'cue' [L, 1] and 'symbols' [L, n_classes] (one-hot, plus noise) and an int label.

    Raises:
        DataError: if the length does not hold every class at least once.
    """
    slots = symbol_times(config)
    if config.n_classes < 2 or config.delay < 1 or not len(slots):
        raise DataError(
            f"n_classes={config.n_classes}, delay={config.delay}, length={config.length}: expected at least 2 classes, "
            f"a delay of at least 1 and a length above delay + {SPACING} * (n_classes - 1); change data.length"
        )
    info = DataInfo(
        features={"cue": 1, "symbols": config.n_classes},
        task=TaskConfig(kind="classification", n_outputs=config.n_classes),
        label_names=tuple(str(i) for i in range(config.n_classes)),
    )
    sizes = {"train": config.n_train, "valid": config.n_valid, "test": config.n_test}
    return Splits(info, **{split: _CuedRecall(config, split, size) for split, size in sizes.items()})


def symbol_times(config: SyntheticConfig) -> np.ndarray:
    """Times of the symbols: from `delay` on, so that each can be cued, a multiple of n_classes in number."""
    times = np.arange(config.delay, config.length, SPACING)
    return times[: len(times) // config.n_classes * config.n_classes]


class _CuedRecall:
    def __init__(self, config: SyntheticConfig, split: str, size: int):
        self._config = config
        self._split = split
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Sample:
        config, index = self._config, range(self._size)[index]
        rng = np.random.default_rng([config.seed, ("train", "valid", "test").index(self._split), index])
        times = symbol_times(config)
        symbols = rng.permutation(np.arange(len(times)) % config.n_classes)
        target = rng.integers(len(times))
        cue = np.zeros((config.length, 1), np.float32)
        cue[times[target] - config.delay] = 1
        shown = np.zeros((config.length, config.n_classes), np.float32)
        shown[times, symbols] = 1
        inputs = {
            name: values + config.noise * rng.standard_normal(values.shape, np.float32)
            for name, values in (("cue", cue), ("symbols", shown))
        }
        return {"inputs": inputs, "label": int(symbols[target]), "id": f"{self._split}/{index}"}
