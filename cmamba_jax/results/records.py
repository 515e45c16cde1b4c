"""Records: one JSON file for each measurement, with the command, the device and the versions that it was made with."""

import os
import pathlib
import platform
import re
from collections.abc import Mapping, Sequence
from typing import Any

from cmamba_jax.errors import UserError
from cmamba_jax.train.runs import read_json, write_json

Record = Mapping[str, Any]

KINDS = (
    "conv",
    "crossval",
    "device_table",
    "efficiency",
    "scaling",
    "scan",
    "seeds",
    "step",
    "stream",
    "sweep",
    "tpu_static",
)
"""Key "kind" of a record. All have "command", "device" and "versions"; the rest is what the command describes."""


def describe(kind: str, words: Sequence[str] | str) -> dict[str, str]:
    """The head of a record: its kind, command, and the device and versions of this process.

    Args:
        kind: one of `KINDS`.
        words: what the command line says after ``cmamba``, as words or as one string.
    """
    import jax

    import cmamba_jax

    assert kind in KINDS, kind
    flags = f"XLA_FLAGS='{os.environ['XLA_FLAGS']}' " if os.environ.get("XLA_FLAGS") else ""
    device = f"{jax.devices()[0].device_kind} ({jax.default_backend()})"
    if jax.default_backend() == "cpu":
        cores = len(os.sched_getaffinity(0))
        device = f"{cores} core{'s' * (cores > 1)} of {platform.machine()} CPU"
    elif jax.device_count() > 1:
        device = f"{jax.device_count()} x {device}"
    command = words if isinstance(words, str) else " ".join(words)
    command = re.sub(r" --output[ =]\S+", "", command)  # where the record was first written says nothing to others
    return {
        "kind": kind,
        "command": f"{flags}cmamba {command}",
        "device": device,
        "versions": f"cmamba_jax {cmamba_jax.__version__}, jax {jax.__version__}, Python {platform.python_version()}",
    }


def save(record: Record, folder: pathlib.Path) -> pathlib.Path:
    """Writes a record of a benchmark into a folder of runs, as KIND.json; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record['kind']}.json"
    write_json(path, dict(record))
    return path


def collect(runs: pathlib.Path, records: pathlib.Path) -> list[pathlib.Path]:
    """Copies the records of finished sweeps, cross-validations and benchmarks out of a folder of runs.

    A record replaces the older one of the same kind, name and device.

    Args:
        runs: is searched at any depth.
        records: folder that keeps them, such as results/.

    Returns:
        The files written.
    """
    written = []
    for path in sorted(runs.rglob("*.json")):
        if path.stem not in KINDS:
            continue
        record = read_json(path)
        if record.get("kind") != path.stem or (path.stem == "crossval" and "mean" not in record):
            continue  # Another program's file, or an unfinished cross-validation.
        if path.stem == "crossval":
            record.pop("config", None)  # Long; it follows from the command.
        if path.stem == "sweep":
            # Settings are long, and follow from the command and the label.
            record["rows"] = [{k: v for k, v in row.items() if k != "settings"} for row in record["rows"]]
        records.mkdir(parents=True, exist_ok=True)
        target = records / f"{_file_name(record)}.json"
        write_json(target, record)
        written.append(target)
    return written


def _file_name(record: Record) -> str:
    """Sweeps and cross-validations by name; benchmarks by device too, since their numbers are the device's."""
    detail = record.get("name", "")
    if record["kind"] not in ("sweep", "crossval"):
        detail += " " + re.sub(r"^\d+ cores? of ", "", record["device"].replace(" x ", "x"))
    return re.sub(r"[^a-z0-9]+", "_", f"{record['kind']}_{detail}".lower()).strip("_")


def read_all(folder: pathlib.Path) -> list[dict[str, Any]]:
    """All records of a folder, in the order of their files' names.

    Raises:
        UserError: a file is no record.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        record = read_json(path)
        if lacking := {"kind", "command", "device", "versions"} - record.keys():
            raise UserError(f"{path} is no record: it lacks {', '.join(sorted(lacking))}; `cmamba results` writes them")
        found.append(record)
    return found
