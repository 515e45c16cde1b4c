"""Checks of the data, each failure one message: what was expected, what came, how to mend it."""

from __future__ import annotations

import typing
from collections.abc import Mapping

import numpy as np

from cmamba_jax.errors import UserError

if typing.TYPE_CHECKING:
    from cmamba_jax.data.dataset import DataInfo, Sample


class DataError(UserError):
    """The data is not as expected; the message names the place and the cure."""


def checked(sample: Sample, info: DataInfo) -> Sample:
    """Checks one sample and returns its complete form.

    Args:
        sample: as a split holds it; masks may be absent.
        info: what the data set promises.

    Returns:
        The sample with the modalities in the order of ``info.features``, inputs float32 [L, F] that are zero
        where their mask is False, all masks bool [L], the label int32 or float32 (a single regression target
        gains its axis), and for labels per step ``label_mask`` bool [L]: False where the label is masked or
        where no modality exists.

    Raises:
        DataError: naming the sample, what was expected, what came and the cure.
    """
    where = f"sample {sample['id']!r}"
    inputs = _inputs(sample["inputs"], info, where)
    length = len(next(iter(inputs.values())))
    masks = _masks(sample.get("mask") or {}, info, length, where)
    for name, values in inputs.items():
        bad = ~np.isfinite(values)
        bad[~masks[name]] = False
        if bad.any():
            step, feature = np.argwhere(bad)[0]
            raise DataError(
                f"{where}: modality {name!r} holds {values[step, feature]} at step {step}, feature {feature} (expected "
                f"finite numbers); repair the value, or mark the step as missing with mask[{name!r}][{step}] = False"
            )
        if not masks[name].all():
            inputs[name] = np.where(masks[name][:, None], values, np.float32(0))
    exists = np.any(list(masks.values()), axis=0)
    if not exists.any():
        raise DataError(
            f"{where}: every modality is masked at every step (expected at least one existing step); "
            "remove the sample or correct its masks"
        )
    result: Sample = {"inputs": inputs, "mask": masks, "id": sample["id"], "label": sample["label"]}
    if info.task.per == "step":
        result["label_mask"] = exists & _bool_vector(sample.get("label_mask"), length, f"{where}: label_mask")
        result["label"] = _labels(sample["label"], info, (length,), result["label_mask"], where)
    else:
        result["label"] = _labels(sample["label"], info, (), np.array(True), where)
    return result


def _inputs(given: Mapping[str, np.ndarray], info: DataInfo, where: str) -> dict[str, np.ndarray]:
    """The modalities as float32 [L, F], of one common length L."""
    expected = ", ".join(info.features)
    for name in given:
        if name not in info.features:
            raise DataError(
                f"{where}: unknown modality {name!r} (expected {expected}); rename it or leave it out of every sample"
            )
    inputs = {}
    for name, width in info.features.items():
        if name not in given:
            raise DataError(
                f"{where}: modality {name!r} is absent (expected {expected}); "
                f"if it is missing, give zeros [L, {width}] and mask[{name!r}] all False"
            )
        values = np.asarray(given[name], np.float32)
        if values.ndim != 2 or values.shape[1] != width or not len(values):
            raise DataError(
                f"{where}: modality {name!r} has shape {list(values.shape)}, expected [L, {width}] with L >= 1; "
                "every sample needs the same features in the same order"
            )
        inputs[name] = values
    lengths = {name: len(values) for name, values in inputs.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(
            f"{where}: the modalities have different lengths {lengths} (expected one common L); "
            "resample them to a common length first (cmamba_jax.data.resample)"
        )
    return inputs


def _masks(given: Mapping[str, np.ndarray], info: DataInfo, length: int, where: str) -> dict[str, np.ndarray]:
    for name in given:
        if name not in info.features:
            raise DataError(f"{where}: mask of an unknown modality {name!r} (expected {', '.join(info.features)})")
    return {name: _bool_vector(given.get(name), length, f"{where}: mask[{name!r}]") for name in info.features}


def _bool_vector(given: np.ndarray | None, length: int, what: str) -> np.ndarray:
    if given is None:
        return np.ones(length, bool)
    mask = np.asarray(given)
    if mask.shape != (length,) or mask.dtype != bool:
        raise DataError(
            f"{what} has shape {list(mask.shape)} and dtype {mask.dtype}, expected [{length}] and bool "
            "(True where the step exists)"
        )
    return mask


def _labels(label: typing.Any, info: DataInfo, lead: tuple[int, ...], counts: np.ndarray, where: str) -> np.ndarray:
    """The label, zero where it does not count: int32 `lead` (classification), else float32 [*lead, n_outputs]."""
    n_outputs, kind = info.task.n_outputs, info.task.kind
    label = np.asarray(label)
    if kind == "classification":
        if label.dtype.kind not in "iub" or label.shape != lead:
            raise DataError(
                f"{where}: label of shape {list(label.shape)} and dtype {label.dtype}, expected integers of shape "
                f"{list(lead)} (classification per {info.task.per}); convert it, or set another task"
            )
        wrong = counts & ((label < 0) | (label >= n_outputs))
        cure = f"expected a class in 0..{n_outputs - 1}; correct the label"
    else:
        if n_outputs == 1 and label.shape == lead:
            label = label[..., None]
        if label.dtype.kind not in "iubf" or label.shape != (*lead, n_outputs):
            raise DataError(
                f"{where}: label of shape {list(label.shape)} and dtype {label.dtype}, expected numbers of shape "
                f"{[*lead, n_outputs]} ({kind} per {info.task.per}); every sample needs the same targets"
            )
        if kind == "regression":
            bad, cure = ~np.isfinite(label), "expected finite numbers; correct the label"
        else:
            bad, cure = (label != 0) & (label != 1), "expected 0 or 1 for each label; correct it"
        wrong = counts & bad.any(axis=-1)
    if info.task.per == "step":
        cure += " or mask the step with label_mask"
    if wrong.any():
        place = f" at step {np.flatnonzero(wrong)[0]}" if lead else ""
        raise DataError(f"{where}: label {label[wrong][0]}{place} ({cure})")
    if kind == "classification":
        return np.where(counts, label, 0).astype(np.int32)
    return np.where(counts[..., None], label, 0).astype(np.float32)
