"""Normalisation and random changes of samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from scipy.spatial.transform import Rotation

from cmamba_jax.config import AugmentConfig
from cmamba_jax.data.checks import DataError
from cmamba_jax.data.dataset import Sample

NormalizeKind = Literal["standard", "minmax", "none"]


@dataclasses.dataclass(frozen=True)
class Normalizer:
    """Scales every feature: (x - offset) / scale, and zero at masked steps.

    Attributes:
        offset: per modality float32 [F]: the mean ("standard"), the minimum ("minmax") or 0 ("none").
        scale: per modality float32 [F]: the standard deviation, the range or 1; also 1 for constant features.
    """

    offset: dict[str, np.ndarray]
    scale: dict[str, np.ndarray]

    @classmethod
    def fit(cls, samples: Iterable[Sample], kind: NormalizeKind) -> Normalizer:
        """Fits offset and scale in one pass over samples, which are not kept.

        Args:
            samples: complete samples (see `checks.checked`); masked steps do not count.
            kind: "standard": mean 0 and (population) standard deviation 1; "minmax": 0 to 1; "none": unchanged.

        Returns:
            The normaliser.

        Raises:
            DataError: if there is no sample, or a modality is masked everywhere.
        """
        moments: dict[str, _Moments] = {}
        for sample in samples:
            for name, values in sample["inputs"].items():
                moments.setdefault(name, _Moments(values.shape[1])).update(values[sample["mask"][name]])
        if not moments:
            raise DataError("there is no training sample to fit the normaliser on (expected at least one)")
        for name, moment in moments.items():
            if kind != "none" and not moment.count:
                raise DataError(
                    f"modality {name!r} is masked in every training sample (expected one existing step at least); "
                    "leave it out, or set pipeline.normalize to none"
                )
        scaling = {name: moment.scaling(kind) for name, moment in moments.items()}
        return cls(
            offset={name: offset.astype(np.float32) for name, (offset, _) in scaling.items()},
            scale={name: scale.astype(np.float32) for name, (_, scale) in scaling.items()},
        )

    def __call__(self, sample: Sample) -> Sample:
        """Returns the sample with normalised inputs, float32."""
        inputs = {
            name: np.where(
                sample["mask"][name][:, None], (values - self.offset[name]) / self.scale[name], np.float32(0)
            )
            for name, values in sample["inputs"].items()
        }
        return {**sample, "inputs": inputs}

    def to_dict(self) -> dict[str, Any]:
        """A dict of dicts of lists for JSON; `from_dict` restores it exactly."""
        return {
            part: {name: values.tolist() for name, values in getattr(self, part).items()}
            for part in ("offset", "scale")
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Mapping[str, list[float]]]) -> Normalizer:
        """The inverse of `to_dict`."""
        parts = {
            part: {name: np.asarray(numbers, np.float32) for name, numbers in values[part].items()}
            for part in ("offset", "scale")
        }
        return cls(**parts)


class _Moments:
    """Count, mean, sum of squared deviations, minimum and maximum of each feature (Chan et al.'s merging)."""

    def __init__(self, width: int):
        self.count = 0
        self.mean = np.zeros(width)
        self.squares = np.zeros(width)
        self.minimum = np.full(width, np.inf)
        self.maximum = np.full(width, -np.inf)

    def update(self, values: np.ndarray) -> None:
        """Adds the rows of values [n, F]."""
        if not len(values):
            return
        values = values.astype(np.float64)
        total = self.count + len(values)
        mean = values.mean(axis=0)
        delta = mean - self.mean
        self.squares += ((values - mean) ** 2).sum(axis=0) + delta**2 * self.count * len(values) / total
        self.mean += delta * len(values) / total
        self.minimum = np.minimum(self.minimum, values.min(axis=0))
        self.maximum = np.maximum(self.maximum, values.max(axis=0))
        self.count = total

    def scaling(self, kind: NormalizeKind) -> tuple[np.ndarray, np.ndarray]:
        """Offset and scale, float64 [F]."""
        if kind == "none":
            return np.zeros_like(self.mean), np.ones_like(self.mean)
        constant = self.minimum == self.maximum
        if kind == "minmax":
            return self.minimum, np.where(constant, 1, self.maximum - self.minimum)
        return self.mean, np.where(constant, 1, np.sqrt(self.squares / self.count))


def augment(sample: Sample, config: AugmentConfig, rng: np.random.Generator) -> Sample:
    """Applies the changes of raw (not yet normalised) samples: time warp, mirror image, rotation, scale and swap.

    Args:
        sample: a complete sample (see `checks.checked`).
        config: strengths; zero switches a change off.
        rng: source of the random numbers.

    Returns:
        A changed sample of the same shapes.
    """
    sample = mirror(time_warp(sample, config.time_warp, rng), config.mirror, rng)
    return swap(scale(rotate(sample, config.rotation, rng), config.scale, rng), config.swap, rng)


def time_warp(sample: Sample, deviation: float, rng: np.random.Generator) -> Sample:
    """Plays a sample at the random speed exp(deviation * normal), keeping its length L.

    A slow sample shows a random part of the original; a fast one shows all of it at a random place, and its
    first and last step are held around it. Inputs are interpolated linearly between existing steps; masks and
    labels per step are those of the nearest step. A sample that would lose all of its steps stays as it is.
    """
    if not deviation:
        return sample
    length = len(next(iter(sample["inputs"].values())))
    speed = np.exp(deviation * rng.standard_normal())
    start = rng.uniform() * (length - 1) * (1 - speed)
    times = np.clip(start + speed * np.arange(length), 0, length - 1)
    nearest = np.floor(times + 0.5).astype(int)
    mask = {name: values[nearest] for name, values in sample["mask"].items()}
    if not np.any(list(mask.values())):
        return sample
    inputs = {name: _interpolate(values, sample["mask"][name], times) for name, values in sample["inputs"].items()}
    warped: Sample = {**sample, "inputs": inputs, "mask": mask}
    if "label_mask" in sample:
        warped["label"] = sample["label"][nearest]
        warped["label_mask"] = sample["label_mask"][nearest]
    return warped


def _interpolate(values: np.ndarray, mask: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Linear interpolation of values [L, F] at times [L], where missing steps have no weight."""
    low = np.floor(times).astype(int)
    high = np.minimum(low + 1, len(values) - 1)
    part = times - low
    weight_low, weight_high = (1 - part) * mask[low], part * mask[high]
    total = weight_low + weight_high
    total[total == 0] = 1
    weight_low, weight_high = ((w / total).astype(np.float32)[:, None] for w in (weight_low, weight_high))
    return weight_low * values[low] + weight_high * values[high]


def rotate(sample: Sample, largest: float, rng: np.random.Generator) -> Sample:
    """Rotates every modality of three features about one random axis by a random angle of at most `largest` degrees.

    The rotation is the same for all of them, since the sensors of a device turn together.
    """
    if not largest:
        return sample
    axis = rng.standard_normal(3)
    angle = np.deg2rad(rng.uniform(0, largest))
    matrix = Rotation.from_rotvec(angle * axis / np.linalg.norm(axis)).as_matrix().astype(np.float32)
    inputs = {name: values @ matrix.T if values.shape[1] == 3 else values for name, values in sample["inputs"].items()}
    return {**sample, "inputs": inputs}


def mirror(sample: Sample, signs: Sequence[float], rng: np.random.Generator) -> Sample:
    """Multiplies the features by `signs`, those of all modalities in their order, for every other sample at random.

    A left arm moves like the mirror image of a right one. In a mirror across the x axis accelerations (vectors) take
    the signs (-1, 1, 1) and angular velocities (axial vectors) the opposite ones, (1, -1, -1).
    """
    if not signs or rng.uniform() < 0.5:
        return sample
    inputs, start = {}, 0
    for name, values in sample["inputs"].items():
        inputs[name] = values * np.asarray(signs[start : start + values.shape[1]], np.float32)
        start += values.shape[1]
    return {**sample, "inputs": inputs}


def scale(sample: Sample, deviation: float, rng: np.random.Generator) -> Sample:
    """Multiplies each modality by a random factor exp(deviation * normal)."""
    if not deviation:
        return sample
    inputs = {
        name: values * np.float32(np.exp(deviation * rng.standard_normal()))
        for name, values in sample["inputs"].items()
    }
    return {**sample, "inputs": inputs}


def swap(sample: Sample, probability: float, rng: np.random.Generator) -> Sample:
    """Shows, at random steps of each modality, the features (and their mask) of a random step of the same sample."""
    if not probability:
        return sample
    inputs, mask = {}, {}
    for name, values in sample["inputs"].items():
        steps = np.arange(len(values))
        source = np.where(rng.uniform(size=len(values)) < probability, rng.permutation(steps), steps)
        inputs[name], mask[name] = values[source], sample["mask"][name][source]
    return {**sample, "inputs": inputs, "mask": mask}


def jitter(sample: Sample, deviation: float, rng: np.random.Generator) -> Sample:
    """Adds normal noise to the existing steps of a normalised sample."""
    if not deviation:
        return sample
    inputs = {
        name: values
        + np.float32(deviation) * sample["mask"][name][:, None] * rng.standard_normal(values.shape, np.float32)
        for name, values in sample["inputs"].items()
    }
    return {**sample, "inputs": inputs}
