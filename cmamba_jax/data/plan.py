"""Which samples form which batch, and the length each batch is padded to."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

FILLER = -1
"""Stands for no sample in a row of an incomplete batch."""


@dataclasses.dataclass(frozen=True)
class PlannedBatch:
    """One batch.

    Attributes:
        rows: int [batch_size], the index of the sample of each row, or FILLER.
        length: steps that the batch is padded to.
    """

    rows: Int[np.ndarray, "B"]
    length: int


def bucket_lengths(lengths: Int[np.ndarray, "samples"], buckets: Sequence[int]) -> Int[np.ndarray, "samples"]:
    """The padded length of each sample: the smallest bucket that holds it, or the longest sample's without buckets.

    Args:
        lengths: int [samples].
        buckets: lengths, in any order; the largest holds the longest sample.

    Returns:
        int [samples].
    """
    sizes = np.sort(buckets) if buckets else np.array([lengths.max()])
    return sizes[np.searchsorted(sizes, lengths)]


def round_up(lengths: Int[np.ndarray, "samples"], multiple: int) -> Int[np.ndarray, "samples"]:
    """Lengths as multiples of a number."""
    return -(-lengths // multiple) * multiple


def train_plan(padded: Int[np.ndarray, "samples"], batch_size: int, *, seed: int, epoch: int) -> list[PlannedBatch]:
    """One epoch in random order: every sample once, each batch of one bucket.

    The number of batches depends neither on the seed nor on the epoch.

    Args:
        padded: int [samples], the padded length of each sample.
        batch_size: rows of a batch; the last batch of each bucket is filled up with FILLER.
        seed: seed of the order.
        epoch: number of the epoch; each has another order.

    Returns:
        The batches, those of all buckets mixed.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(padded))
    batches = []
    for length in np.unique(padded):
        batches += _chunks(order[padded[order] == length], batch_size, padded)
    return [batches[i] for i in rng.permutation(len(batches))]


def eval_plan(padded: Int[np.ndarray, "samples"], batch_size: int) -> list[PlannedBatch]:
    """All samples in order; each batch has the length of the largest bucket among its samples."""
    return _chunks(np.arange(len(padded)), batch_size, padded)


def _chunks(samples: np.ndarray, batch_size: int, padded: np.ndarray) -> list[PlannedBatch]:
    rows = np.pad(samples, (0, -len(samples) % batch_size), constant_values=FILLER).reshape(-1, batch_size)
    return [PlannedBatch(row, int(padded[row[row != FILLER]].max())) for row in rows]
