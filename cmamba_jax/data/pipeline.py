"""From samples to batches of one static shape."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import grain
import numpy as np

from cmamba_jax.batch import Array, Batch
from cmamba_jax.config import MissingConfig, PipelineConfig
from cmamba_jax.data import missing, plan, transforms
from cmamba_jax.data.checks import DataError, checked
from cmamba_jax.data.dataset import DataInfo, Sample, Splits

Split = Literal["train", "valid", "test"]

_WHOLE = MissingConfig()
KEPT_BYTES = 2**28
"""A split up to this size is kept in memory once it is checked, for all epochs and seeds."""


class Pipeline:
    """Checks a data set, fits its normaliser, and makes batches of numpy arrays.

    All batches of one bucket have the same shapes. Masks are False at padding and where a modality is missing;
    inputs are zero there. Rows that fill up an incomplete batch repeat its first sample with weight 0, so no
    sample is lost and every row is valid input. Labels per step are padded with zeros that ``label_mask`` excludes.

    Construction reads every sample of the three splits once, so faults show before training starts.

    Attributes:
        info: description of the data set.
        normalizer: feature scaling, fitted on the training samples.
        steps_per_epoch: training batches of an epoch; the same for all epochs.
    """

    def __init__(
        self,
        splits: Splits,
        config: PipelineConfig,
        *,
        seed: int,
        normalizer: transforms.Normalizer | None = None,
        length_multiple: int = 1,
    ):
        """Prepares the pipeline.

        Args:
            splits: the data set.
            config: batch sizes, buckets, normalisation, augmentation, missing data and threads.
            seed: seed of the order, of the augmentation and of what is missing.
            normalizer: the one of an earlier run, used as it is; None: fitted on the training samples.
            length_multiple: padded lengths are rounded up to multiples of it; masks make that change nothing.

        Raises:
            DataError: if a sample is not as ``splits.info`` says, is longer than the largest bucket, a split is
                empty, or the configuration does not suit the data.
        """
        self.info: DataInfo = splits.info
        self._splits = splits
        self._config = config
        self._seed = seed
        _check_config(config, self.info)
        missing.check(config.missing, self.info)
        lengths: dict[Split, list[int]] = {"train": [], "valid": [], "test": []}
        self._kept: dict[Split, list[Sample]] = {}
        training = self._scan("train", lengths["train"])
        if normalizer is not None:
            _check_normalizer(normalizer, self.info)
        else:
            normalizer = transforms.Normalizer.fit(training, config.normalize)
        for samples in (training, self._scan("valid", lengths["valid"]), self._scan("test", lengths["test"])):
            for _ in samples:
                pass
        self.normalizer: transforms.Normalizer = normalizer
        self._padded = {
            split: plan.round_up(plan.bucket_lengths(np.array(n), config.buckets), length_multiple)
            for split, n in lengths.items()
        }
        self._epoch_plan = functools.lru_cache(maxsize=2)(self._train_plan)
        self.steps_per_epoch: int = len(self._epoch_plan(0))

    def with_seed(self, seed: int) -> Pipeline:
        """The same pipeline with the order and the augmentation of another seed; reads nothing again.

        Equal to a pipeline made with this seed: neither the checks, the normaliser nor the lengths depend on it.
        """
        other = copy.copy(self)
        other._seed = seed
        other._epoch_plan = functools.lru_cache(maxsize=2)(other._train_plan)
        return other

    def train(self, rows: slice | None = None) -> Iterator[Batch]:
        """Training batches without end, each epoch in another order.

        Args:
            rows: the rows of each batch to read, for a process that shares batches with others. All processes plan
                the same batches, so that together they see every sample once an epoch; None: all rows.

        Returns:
            A grain iterator. Its ``get_state()`` is a small JSON-able dict; after ``set_state`` of it, on an
            iterator of an equal pipeline, the same batches follow to the bit, augmentation included.
        """
        steps = grain.MapDataset.range(self.steps_per_epoch).repeat()
        batches = steps.map_with_index(lambda step, _: self._train_batch(step, rows))
        return iter(batches.to_iter_dataset(self._read_options()))

    def batches(self, split: Split, removed: MissingConfig = _WHOLE) -> Iterable[Batch]:
        """All samples of a split once, in their order and without augmentation.

        Args:
            split: "train", "valid" or "test".
            removed: what to remove from the samples; it depends on its seed and the sample alone.

        Returns:
            A finite iterable that can be iterated again. Rows with weight 1 are the samples.

        Raises:
            DataError: if `removed` does not fit the data.
        """
        missing.check(removed, self.info)
        planned = plan.eval_plan(self._padded[split], self._config.eval_batch_size)
        batches = grain.MapDataset.source(planned).map(
            lambda batch: self._collate(batch, lambda index: self._whole(split, index, removed))
        )
        return batches.to_iter_dataset(self._read_options())

    def _scan(self, split: Split, lengths: list[int]) -> Iterator[Sample]:
        """Checks the samples one by one, notes their lengths, and keeps them all if they are small."""
        samples, longest = getattr(self._splits, split), max(self._config.buckets, default=None)
        kept: list[Sample] = []
        size = 0
        if not len(samples):
            raise DataError(f"the {split} split is empty (expected at least one sample); change how the data is split")
        for index in range(len(samples)):
            sample = checked(samples[index], self.info)
            length = _length(sample)
            if longest is not None and length > longest:
                raise DataError(
                    f"sample {sample['id']!r} has {length} steps, expected at most {longest}, the largest of "
                    f"pipeline.buckets; add a bucket of at least {length}, or cut the sample"
                )
            lengths.append(length)
            size += sum(values.nbytes for part in ("inputs", "mask") for values in sample[part].values())
            if size <= KEPT_BYTES:
                kept.append(sample)
            yield sample
        if len(kept) == len(samples):
            self._kept[split] = kept

    def _sample(self, split: Split, index: int) -> Sample:
        """A sample in its complete form."""
        if split in self._kept:
            return self._kept[split][index]
        return checked(getattr(self._splits, split)[index], self.info)

    def _train_plan(self, epoch: int) -> list[plan.PlannedBatch]:
        return plan.train_plan(self._padded["train"], self._config.batch_size, seed=self._seed, epoch=epoch)

    def _train_batch(self, step: int, rows: slice | None) -> Batch:
        epoch, position = divmod(step, self.steps_per_epoch)
        return self._collate(self._epoch_plan(epoch)[position], lambda index: self._changed(index, epoch), rows)

    def _collate(self, batch: plan.PlannedBatch, prepare: Callable[[int], Sample], rows: slice | None = None) -> Batch:
        """Prepares, pads and stacks the samples of a batch, or of some of its rows."""
        chosen = batch.rows[rows or slice(None)]
        real = chosen != plan.FILLER
        samples = [prepare(int(index)) for index in chosen[real]]
        if not all(real):
            # Not a sample of this process where all of its rows are filler.
            filler = samples[0] if rows is None else prepare(int(batch.rows[0]))
            samples += [filler] * int(np.sum(~real))

        def stacked(part: Literal["inputs", "mask"]) -> dict[str, Array]:
            return {name: _stack([s[part][name] for s in samples], batch.length) for name in self.info.features}

        per_step = self.info.task.per == "step"
        labels = [sample["label"] for sample in samples]
        return Batch(
            inputs=stacked("inputs"),
            mask=stacked("mask"),
            labels=_stack(labels, batch.length) if per_step else np.stack(labels),
            weight=real.astype(np.float32),
            label_mask=_stack([sample["label_mask"] for sample in samples], batch.length) if per_step else None,
        )

    def _whole(self, split: Split, index: int, removed: MissingConfig) -> Sample:
        """A sample for evaluation."""
        sample = self.normalizer(self._sample(split, index))
        rng = np.random.default_rng([removed.seed, ("train", "valid", "test").index(split), index])
        return missing.remove(sample, removed, rng)

    def _changed(self, index: int, epoch: int) -> Sample:
        """A sample for training, augmented."""
        sample = self._sample("train", index)
        # The trailing numbers keep these streams apart from that of the order, which is keyed by [seed, epoch].
        rng, rng_missing = (np.random.default_rng([self._seed, epoch, index, stream]) for stream in (1, 2))
        augment = self._config.augment
        sample = transforms.jitter(self.normalizer(transforms.augment(sample, augment, rng)), augment.jitter, rng)
        return missing.remove(sample, self._config.missing, rng_missing)

    def _read_options(self) -> grain.ReadOptions:
        threads = self._config.read_threads
        return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)


def _check_config(config: PipelineConfig, info: DataInfo) -> None:
    for name in ("batch_size", "eval_batch_size"):
        if getattr(config, name) < 1:
            raise DataError(f"pipeline.{name} is {getattr(config, name)}, expected at least 1")
    if config.augment.rotation and 3 not in info.features.values():
        raise DataError(
            f"pipeline.augment.rotation is {config.augment.rotation}, but no modality has three features "
            f"({info.features}), and only these can be rotated; set it to 0"
        )
    mirror, n_features = config.augment.mirror, sum(info.features.values())
    if mirror and (len(mirror) != n_features or not {1, -1}.issuperset(mirror)):
        raise DataError(
            f"pipeline.augment.mirror is {mirror}, expected {n_features} signs, 1 or -1, one for each feature of "
            f"{', '.join(info.features)} in this order; correct it, or leave it empty"
        )


def _check_normalizer(normalizer: transforms.Normalizer, info: DataInfo) -> None:
    fitted = {name: len(values) for name, values in normalizer.offset.items()}
    if fitted != info.features:
        raise DataError(
            f"the given normalizer was fitted on the features {fitted}, but the data has {info.features}; "
            "use data with the features of the run that the normalizer comes from"
        )


def _length(sample: Sample) -> int:
    return len(next(iter(sample["inputs"].values())))


def _stack(arrays: Sequence[np.ndarray], length: int) -> np.ndarray:
    """Arrays [L_i, ...] as one [B, length, ...] with zeros (False) behind the end of each."""
    out = np.zeros((len(arrays), length, *arrays[0].shape[1:]), arrays[0].dtype)
    for row, values in zip(out, arrays, strict=True):
        row[: len(values)] = values
    return out
