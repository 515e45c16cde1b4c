"""Checkpoints: the newest and the best training state, written whole or not at all."""

import contextlib
import dataclasses
import json
import pathlib
import shutil
import zlib
from collections.abc import Iterator
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from cmamba_jax.errors import UserError
from cmamba_jax.train.runs import write_json
from cmamba_jax.train.state import Params, Strategy, TrainState

_SEAL = "files.json"
"""Checksums of all files of a checkpoint, in its folder."""
_METADATA = "_CHECKPOINT_METADATA"
"""A file of Orbax's in every whole checkpoint."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or of another model."""


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a run stands; everything is a JSON value.

    Attributes:
        step: batches so far.
        epoch: epochs finished.
        best_epoch: epoch of the best validation value, 0 before the first.
        best_value: that value.
        data: state of the data iterator.
        losses: in the middle of an epoch, losses of the steps that no record holds yet.
    """

    step: int = 0
    epoch: int = 0
    best_epoch: int = 0
    best_value: float = float("nan")
    data: Any = None
    losses: tuple[float, ...] = ()


class Checkpoints:
    """The folders ``best`` and ``last`` of a run.

    Each holds one folder a checkpoint, named by its step. Orbax writes in the background into a temporary folder and
    renames it, so that a killed run leaves complete checkpoints only; checksums of the files, added when the next
    checkpoint is saved or at the end, tell later whether they have changed. Where ``last`` keeps several, an older one
    serves when the newest is damaged.

    Args:
        folder: the run's ``checkpoints`` folder.
        strategy: how the states lie on the devices; what is saved depends on neither strategy nor mesh.
        keep: newest checkpoints that ``last`` keeps; ``best`` keeps one.

    Raises:
        CheckpointError: the folder cannot be written.
    """

    def __init__(self, folder: pathlib.Path, strategy: Strategy | None = None, *, keep: int = 2):
        self._folder = folder
        self._strategy = strategy or Strategy()
        with _write_errors(folder):
            self._keepers = {name: _open(folder / name, n) for name, n in (("best", 1), ("last", keep))}
        self._writing: dict[str, tuple[Any, pathlib.Path]] = {}

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
            return
        with contextlib.suppress(CheckpointError):  # The error that ends the run is the one to show.
            self.close()

    def save(self, name: str, state: TrainState, position: Position) -> None:
        """Starts to save the whole training state; all processes call it.

        Args:
            name: "best" or "last".
            state: the state; it may be donated as soon as this returns.
            position: where the run stands.

        Raises:
            CheckpointError: this or the checkpoint before it cannot be written; those before are whole.
        """
        # A "last" whose position names a best that was killed on its way would resume to another result.
        self._finish("best")
        self._finish(name)
        keeper, path = self._keepers[name], self._folder / name / str(position.step)
        with _write_errors(path):
            # A resumed run comes past steps that the killed one had saved as its best.
            for newer in [c.step for c in keeper.checkpoints if c.step >= position.step]:
                keeper.delete(newer)
            metadata = {"position": dataclasses.asdict(position)}
            parts = _parts(self._strategy.portable(state))
            response = keeper.save_checkpointables_async(position.step, parts, custom_metadata=metadata)
        self._writing[name] = response, path

    def close(self) -> None:
        """Waits for what is being written, and lets go of the folders.

        Raises:
            CheckpointError: a checkpoint could not be written.
        """
        try:
            for name in list(self._writing):
                self._finish(name)
        finally:
            for keeper in self._keepers.values():
                with contextlib.suppress(Exception):  # The failure of a write has been raised above.
                    keeper.close()

    def _finish(self, name: str) -> None:
        if name in self._writing:
            response, path = self._writing.pop(name)
            with _write_errors(path):
                response.result()
                if jax.process_index() == 0:
                    _seal(path)


@contextlib.contextmanager
def _write_errors(path: pathlib.Path) -> Iterator[None]:
    """Tells the user why a checkpoint cannot be written."""
    try:
        yield
    except Exception as error:  # Orbax raises whatever its storage raises.
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise CheckpointError(
            f"checkpoint {path} cannot be written ({reason}); free space or make the folder writable, then --resume "
            "continues from the checkpoint before it"
        ) from error


def exists(folder: pathlib.Path) -> bool:
    """Whether a run has saved a state to resume from."""
    return bool(_steps(folder / "last"))


def load_last(folder: pathlib.Path, like: TrainState, strategy: Strategy | None = None) -> tuple[TrainState, Position]:
    """Loads the newest training state.

    Args:
        folder: the run's ``checkpoints`` folder.
        like: a state of the same model and optimizer; gives structure, shapes, dtypes and devices.
        strategy: what `like` was placed by; the run that saved may have had another one.

    Raises:
        CheckpointError: there is none, it is damaged, or it belongs to another model; says what to do.
    """
    path = _newest(folder / "last")
    others = [p for p in _steps(path.parent) if p != path]
    cure = (
        f"delete {path} to resume from the one before it, step {others[-1].name}"
        if others
        else f"delete {path.parent} and start the run again"
    )
    strategy = strategy or Strategy()
    parts, position = _load(path, _parts(strategy.portable(like)), cure)
    training = parts["training"]
    key = jax.random.wrap_key_data(training["key"])
    state = TrainState(training["step"], parts["params"], training["opt_state"], key)
    return strategy.place(state), position


def load_params(folder: pathlib.Path, like: Params, *, name: str = "best") -> tuple[Params, Position]:
    """Loads the parameters alone.

    Args:
        folder: the run's ``checkpoints`` folder.
        like: parameters of the same model.
        name: "best" or "last".

    Raises:
        CheckpointError: see `load_last`.
    """
    path = _newest(folder / name)
    other = {"best": "last", "last": "best"}[name]
    parts, position = _load(
        path, {"params": like}, f"use the {other} checkpoint (--checkpoint {other}), or train again"
    )
    return parts["params"], position


def _parts(state: TrainState) -> dict[str, Any]:
    return {
        "params": state.params,
        "training": {"step": state.step, "opt_state": state.opt_state, "key": jax.random.key_data(state.key)},
    }


def _open(folder: pathlib.Path, keep: int) -> ocp.training.Checkpointer:
    folder.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
        for path in _steps(folder)[:-1]:
            if not (path / _METADATA).exists():  # what is left of a deletion that was killed
                shutil.rmtree(path)
    return ocp.training.Checkpointer(
        str(folder.absolute()),
        preservation_policy=ocp.training.preservation_policies.LatestN(keep),  # pyrefly: ignore
        cleanup_tmp_directories=True,
    )


def _seal(path: pathlib.Path) -> None:
    files = [p for p in sorted(path.rglob("*")) if p.is_file()]
    write_json(path / _SEAL, {str(p.relative_to(path)): zlib.crc32(p.read_bytes()) for p in files})


def _damage(path: pathlib.Path) -> str:
    """What is wrong with the files of a checkpoint; empty if nothing is, or if the run was killed before the seal."""
    if not (path / _SEAL).exists():
        return ""
    try:
        checksums = json.loads((path / _SEAL).read_text(encoding="utf-8"))
        changed = [name for name, checksum in checksums.items() if zlib.crc32((path / name).read_bytes()) != checksum]
    except (OSError, ValueError) as error:
        return str(error)
    return f"{changed[0]} has changed since it was written" if changed else ""


def _steps(folder: pathlib.Path) -> list[pathlib.Path]:
    """Folders of complete checkpoints, oldest first."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((p for p in found if p.name.isdigit()), key=lambda p: int(p.name))


def _newest(folder: pathlib.Path) -> pathlib.Path:
    if steps := _steps(folder):
        return steps[-1]
    raise CheckpointError(f"no checkpoint in {folder}: expected a folder named by its step; train the run first")


def _load(path: pathlib.Path, like: dict[str, Any], cure: str) -> tuple[dict[str, Any], Position]:
    """The parts of a checkpoint that `like` names, and where the run stood."""
    problem = _damage(path)  # Found here, since Orbax reports a damaged file in many places and at great length.
    if not problem:
        try:
            return _read(path, like)
        except CheckpointError:
            raise
        except Exception as error:  # Orbax raises whatever its storage raises.
            problem = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    raise CheckpointError(f"checkpoint {path} is damaged or incomplete ({problem}); {cure}")


def _read(path: pathlib.Path, like: dict[str, Any]) -> tuple[dict[str, Any], Position]:
    metadata: Any = ocp.checkpointables_metadata(str(path.absolute()))
    if different := _differences(metadata.metadata["params"], like["params"]):
        raise CheckpointError(f"checkpoint {path} belongs to another model: {different}")
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
    parts = ocp.load_checkpointables(str(path.absolute()), abstract)
    position = metadata.custom_metadata["position"]
    return parts, Position(**position | {"losses": tuple(position.get("losses", ()))})


def _differences(saved: Any, expected: Any) -> str:
    """The first parameter in which two models differ; empty if there is none."""

    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape) for path, leaf in leaves}

    saved, expected = shapes(saved), shapes(expected)
    for name in expected | saved:
        there, here = saved.get(name, "absent"), expected.get(name, "absent")
        if there != here:
            return f"parameter {name} is {there} in the checkpoint, {here} in the model"
    return ""
