"""One's own data: a folder of .npz files, one sample a file."""

import pathlib
import zipfile

import numpy as np

from cmamba_jax.config import NpzConfig
from cmamba_jax.data.checks import DataError
from cmamba_jax.data.dataset import DataInfo, Sample, Splits, describe_task

_MASK = "_mask"


def load(config: NpzConfig) -> Splits:
    """Opens PATH/{train,valid,test}/*.npz; samples are read when they are indexed.

    A file holds one array [L, F] for each modality (a single signal may be [L]), the label under
    ``config.label_key`` and, optionally, bool masks [L]: ``NAME_mask`` of modality NAME, and for labels per step
    ``label_mask``. The first training file sets the modalities and their order.

    Example:
        >>> import pathlib, tempfile
        >>> import numpy as np
        >>> from cmamba_jax import data
        >>> from cmamba_jax.config import NpzConfig
        >>> root, rng = pathlib.Path(tempfile.mkdtemp()), np.random.default_rng(0)
        >>> for split, n_samples in {"train": 8, "valid": 2, "test": 2}.items():
        ...     (root / split).mkdir()
        ...     for i in range(n_samples):
        ...         imu, sound = rng.normal(size=(50, 6)), rng.normal(size=50)
        ...         np.savez(root / split / f"{i:04d}.npz", imu=imu, sound=sound, label=i % 2)
        >>> splits = data.load(NpzConfig(path=str(root)))
        >>> splits.info.features, splits.info.task.n_outputs
        ({'imu': 6, 'sound': 1}, 2)

    Args:
        config: folder, task and name of the label.

    Returns:
        The splits, each in the order of the file names. Class names are numbers; there are as many classes as
        the labels of all files need.

    Raises:
        DataError: naming the folder or file, what was expected and the cure.
    """
    if not config.path:
        raise DataError("data.path is empty; set it to the folder that holds train/, valid/ and test/")
    root = pathlib.Path(config.path).expanduser()
    if not root.is_dir():
        raise DataError(f"{root} is no folder (expected one that holds train/, valid/ and test/); correct data.path")
    splits = {split: _Files(root, split, config) for split in ("train", "valid", "test")}
    features = {name: values.shape[1] for name, values in splits["train"][0]["inputs"].items()}
    labels = (files.label(index) for files in splits.values() for index in range(len(files)))
    task, names = describe_task(config.task, config.per, labels)
    return Splits(DataInfo(features=features, task=task, label_names=names), **splits)


class _Files:
    def __init__(self, root: pathlib.Path, split: str, config: NpzConfig):
        self._root = root
        self._label_key = config.label_key
        self._paths = sorted((root / split).glob("*.npz"))
        if not self._paths:
            cure = "move some samples there" if split == "train" else f"move a tenth of the files of {root}/train there"
            raise DataError(f"{root / split} holds no .npz file (expected one for each {split} sample); {cure}")

    def __len__(self) -> int:
        return len(self._paths)

    def label(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        """The label of a sample and its mask, without reading the inputs."""
        arrays = self._read(index, only=(self._label_key, self._label_key + _MASK))
        return arrays[self._label_key], arrays.get(self._label_key + _MASK)

    def __getitem__(self, index: int) -> Sample:
        arrays = self._read(index)
        sample: Sample = {"inputs": {}, "label": arrays.pop(self._label_key), "id": self._name(index), "mask": {}}
        if self._label_key + _MASK in arrays:
            sample["label_mask"] = arrays.pop(self._label_key + _MASK)
        for key, values in arrays.items():
            if key.endswith(_MASK) and key.removesuffix(_MASK) in arrays:
                sample["mask"][key.removesuffix(_MASK)] = values
            else:
                sample["inputs"][key] = self._signal(index, key, values)
        if not sample["inputs"]:
            raise DataError(f"{self._name(index)} holds no array but the label; expected one [L, F] for each modality")
        return sample

    def _name(self, index: int) -> str:
        return str(self._paths[index].relative_to(self._root))

    def _signal(self, index: int, key: str, values: np.ndarray) -> np.ndarray:
        if values.ndim not in (1, 2) or values.dtype.kind not in "iubf":
            raise DataError(
                f"{self._name(index)}: array {key!r} has shape {list(values.shape)} and dtype {values.dtype}, expected "
                "numbers [L, F] or [L]; every array but the label is a modality, so leave out what is none"
            )
        return values[:, None] if values.ndim == 1 else values

    def _read(self, index: int, only: tuple[str, ...] | None = None) -> dict[str, np.ndarray]:
        try:
            # Opened here because np.load leaves a damaged file open.
            with self._paths[index].open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                arrays = {key: file[key] for key in file.files if only is None or key in only}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(
                f"{self._name(index)} cannot be read ({error}); write it again with np.savez, numeric arrays only"
            ) from error
        if self._label_key not in arrays:
            raise DataError(
                f"{self._name(index)} holds no array {self._label_key!r}; "
                "save the label under that name or set data.label_key"
            )
        return arrays
