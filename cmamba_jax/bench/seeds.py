"""`cmamba bench seeds`: several seeds trained together against the same seeds one after another."""

import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import tyro
from tqdm import tqdm

from cmamba_jax.errors import UserError
from cmamba_jax.results import records


@dataclasses.dataclass(frozen=True)
class Options:
    """Time `cmamba train --seeds` against a `cmamba train` for each seed: start, compilation and reports included."""

    config: pathlib.Path = pathlib.Path("configs/watch.py")
    """Experiment to train."""
    seeds: tuple[int, ...] = (1111, 1112, 1113, 1114, 1115)
    epochs: int = 12
    """Epochs of each run."""
    output: pathlib.Path = pathlib.Path("runs/bench")
    """Folder for seeds.json."""
    json: bool = False
    """Print one JSON object instead of a sentence."""


def main(args: list[str]) -> None:
    """Runs `cmamba bench seeds`.

    Args:
        args: words after ``seeds``.
    """
    options = tyro.cli(Options, args=args, prog="cmamba bench seeds")
    record = records.describe("seeds", ["bench", "seeds", *args]) | measure(options)
    records.save(record, options.output)
    if options.json:
        print(json.dumps(record, indent=2))
        return
    print(
        f"{len(options.seeds)} seeds, {options.epochs} epochs: one after another {record['apart_seconds']:.1f} s, "
        f"together {record['together_seconds']:.1f} s: {record['ratio']:.2f} times"
    )


def measure(options: Options) -> dict[str, Any]:
    """Trains in processes of their own, one at a time, as a user would.

    Returns:
        "config", "seeds", "epochs"; "apart_seconds", the sum over the seeds; "together_seconds"; "ratio" of the two.

    Raises:
        UserError: a training run failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        train = [sys.executable, "-m", "cmamba_jax", "train", str(options.config), "--train.epochs"]
        train += [str(options.epochs), "--train.output", folder]
        together = _seconds([*train, "--seeds", *map(str, options.seeds)])
        apart = [_seconds([*train, "--train.seed", str(seed)]) for seed in tqdm(options.seeds, desc="seeds")]
    return {
        "config": options.config.as_posix(),
        "seeds": list(options.seeds),
        "epochs": options.epochs,
        "apart_seconds": sum(apart),
        "together_seconds": together,
        "ratio": sum(apart) / together,
    }


def _seconds(command: list[str]) -> float:
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"`{' '.join(command[1:])}` failed: {done.stderr.strip().splitlines()[-1:]}")
    return time.perf_counter() - start
