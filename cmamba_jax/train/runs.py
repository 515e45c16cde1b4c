"""Run folders: OUTPUT/NAME/NUMBER and the JSON files in them."""

import dataclasses
import json
import os
import pathlib
from typing import Any

from cmamba_jax.config import ExperimentConfig, ParallelConfig, TaskConfig
from cmamba_jax.config_json import from_dict, to_dict
from cmamba_jax.data import DataInfo
from cmamba_jax.errors import UserError

_MAY_CHANGE = {
    *(f"train.{name}" for name in ("epochs", "patience", "checkpoint_every", "log_every", "progress")),
    *(f"train.{name}" for name in ("output", "run_dir", "resume", "keep_checkpoints", "profile_steps")),
    *(f"parallel.{field.name}" for field in dataclasses.fields(ParallelConfig)),
    "model.remat",
    "paper",
    "pipeline.eval_batch_size",
    "pipeline.read_threads",
}


def open_run(config: ExperimentConfig) -> pathlib.Path:
    """Makes the folder of a new run, or finds the one to resume, and writes its config.json.

    Raises:
        UserError: the folder holds a run and `resume` is off, there is nothing to resume, or the configuration
            differs from that of the run in more than its length and its logging.
    """
    train = config.train
    runs = pathlib.Path(train.output).expanduser() / config.name
    if not train.resume:
        folder = pathlib.Path(train.run_dir).expanduser() if train.run_dir else _next_number(runs)
        if (folder / "config.json").exists():
            raise UserError(f"{folder} holds a run already; add --resume to continue it, or choose another --run-dir")
    else:
        folder = pathlib.Path(train.run_dir).expanduser() if train.run_dir else _last_number(runs)
        if folder is None or not (folder / "config.json").exists():
            raise UserError(f"no run to resume in {folder or runs}; start one without --resume, or set --run-dir")
        _check_same(read_config(folder), config, folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", to_dict(config))
    return folder


def read_config(run_dir: str | os.PathLike) -> ExperimentConfig:
    """The resolved configuration of a run.

    Raises:
        UserError: `run_dir` is no run folder.
    """
    return from_dict(ExperimentConfig, read_json(pathlib.Path(run_dir) / "config.json"))


def write_info(run_dir: pathlib.Path, info: DataInfo) -> None:
    """Writes info.json: modalities (in order), task and label names."""
    write_json(run_dir / "info.json", dataclasses.asdict(info))


def read_info(run_dir: pathlib.Path) -> DataInfo:
    """The inverse of `write_info`."""
    values = read_json(run_dir / "info.json")
    return DataInfo(values["features"], TaskConfig(**values["task"]), tuple(values["label_names"]))


def write_json(path: pathlib.Path, values: Any) -> None:
    """Writes a file at once: a reader sees the old content or the new."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_json(path: pathlib.Path) -> Any:
    """Reads a file of a run.

    Raises:
        UserError: it does not exist or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; expected the folder of a run, such as runs/watch/001") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore it, or train again") from None


def _numbers(runs: pathlib.Path) -> list[pathlib.Path]:
    found = runs.iterdir() if runs.is_dir() else ()
    return sorted((p for p in found if p.name.isdigit()), key=lambda p: int(p.name))


def _next_number(runs: pathlib.Path) -> pathlib.Path:
    numbers = _numbers(runs)
    return runs / f"{int(numbers[-1].name) + 1 if numbers else 1:03d}"


def _last_number(runs: pathlib.Path) -> pathlib.Path | None:
    numbers = _numbers(runs)
    return numbers[-1] if numbers else None


def _check_same(old: ExperimentConfig, new: ExperimentConfig, folder: pathlib.Path) -> None:
    before, now = _flat(to_dict(old)), _flat(to_dict(new))
    changed = [
        f"{name} ({before.get(name)} -> {now.get(name)})"
        for name in before | now
        if before.get(name) != now.get(name) and name not in _MAY_CHANGE
    ]
    if changed:
        raise UserError(
            f"{folder} was trained with other values of {', '.join(changed)}; resume it with the same configuration, "
            "or start a new run"
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
