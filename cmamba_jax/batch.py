"""The batch: what the data pipeline yields and the model reads."""

import dataclasses

import jax
import numpy as np

Array = jax.Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """B samples of M modalities, padded to L steps.

    Attributes:
        inputs: per modality, float [B, L, F_m]. JAX sorts the keys of dicts, so the order of the modalities
            is that of the model's `features`, never that of this dict.
        mask: per modality, bool [B, L], True where a sample of that modality exists; None: everywhere.
        labels: classification int [B] or [B, L]; regression float [B, K] or [B, L, K]; multilabel
            float 0/1 [B, K] or [B, L, K]; None when unknown.
        weight: float [B], 0 for filler rows of an incomplete batch, else 1; None: all ones.
        label_mask: bool [B, L] for labels per step, True where the label counts; None: where any modality exists.
        reset: bool [B, L], True where a new sequence starts (packed sequences); None: nowhere.
    """

    inputs: dict[str, Array]
    mask: dict[str, Array] | None = None
    labels: Array | None = None
    weight: Array | None = None
    label_mask: Array | None = None
    reset: Array | None = None
