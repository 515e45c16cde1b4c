"""The command line: words into configurations and calls, nothing else."""

import argparse
import dataclasses
import difflib
import importlib
import json
import pathlib
import re
import runpy
import sys
import traceback
import typing
from collections.abc import Callable
from typing import Annotated, Any, Literal

import tyro

import cmamba_jax.config
from cmamba_jax.config import ExperimentConfig, MissingConfig, SweepConfig
from cmamba_jax.config_json import check
from cmamba_jax.errors import UserError

_USAGE = """\
usage: cmamba COMMAND ...

Coupled Mamba: train, evaluate and use models that fuse modalities.

commands:
  train CONFIG [--section.field VALUE ...]      train, test and report; --resume continues, --run-dir names the folder,
                                                --seeds 1 2 3 trains several seeds together
  crossval CONFIG [--section.field VALUE ...]   one run a fold; prints mean and standard deviation
  sweep CONFIG [--grid FIELD=A,B ...] [...]     a table of experiments as CSV and Markdown; finished rows are kept;
                                                --folds all, --widths equal_parameters, --only ROW ... (some rows now)
  results [RUNS]                                collects records; writes RESULTS.md and README's tables from them
  info CONFIG [--section.field VALUE ...]       resolved configuration, parameters, FLOPs and scan, as JSON
  eval RUN_DIR [--split test] [--missing.kind modality --missing.rate 0.3]
                                                score a trained model, on whole data or with part of it removed
  predict RUN_DIR INPUT [--output FILE]         predict .npz files: one file, or a folder of them
  explain RUN_DIR INPUT [--output FILE]         picture of what each modality contributes over time to one prediction
  export RUN_DIR FOLDER [--format F]            safetensors + config.json + model card, or StableHLO for any device
  convert CHECKPOINT FOLDER                     the published PyTorch weights as a model of this package
  stream RUN_DIR [--port P] [--state FILE]      answer live samples step by step: JSON lines on stdin or a local socket
  bench {scan,conv,efficiency,step,seeds,scaling,stream,tpu-static}
                                                measure the scan, coupled against attention over the length, the host's
                                                cost of a training step, seeds together, training over more and more
                                                devices, live streams; figures of the TPU compiler; each leaves a
                                                record for `cmamba results`
  doctor                                        versions, devices, and a check of every implementation here

CONFIG is a Python file with a function config() -> ExperimentConfig, such as configs/watch.py.
`cmamba train CONFIG --help` lists every field; `cmamba eval --help` and the like explain the other commands.
"""


def main(argv: list[str] | None = None) -> None:
    """Runs a command and exits: 0, or 2 after a user's mistake, which is one message without a traceback.

    75 means that training was told to stop (SIGTERM) and has saved its state.

    Args:
        argv: words after ``cmamba``; None: those of the process.
    """
    words = sys.argv[1:] if argv is None else argv
    try:
        _run(words)
    except KeyboardInterrupt:
        resume = "; the same command with --resume continues a training run" if words[:1] == ["train"] else ""
        print(f"cmamba: interrupted{resume}", file=sys.stderr)
        sys.exit(130)
    except ValueError as error:
        if not isinstance(error, _user_errors()):
            raise
        print(f"cmamba: error: {error}", file=sys.stderr)
        sys.exit(2)


def _run(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return
    command, *rest = words
    if command not in _COMMANDS:
        close = difflib.get_close_matches(command, _COMMANDS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(f"unknown command {command!r}; expected one of {', '.join(_COMMANDS)}{hint}")
    _COMMANDS[command](rest)


def _user_errors() -> tuple[type[Exception], ...]:
    """The errors of all parts that are a user's to mend; imported late, since only a failure needs them."""
    from cmamba_jax.data import DataError
    from pallas_kernels import ScanInputError, UnsupportedError

    return UserError, DataError, ScanInputError, UnsupportedError


def _train(words: list[str]) -> None:
    config = _parse_config("train", words)
    from cmamba_jax.train import fit, fit_seeds
    from cmamba_jax.train.cluster import is_lead
    from cmamba_jax.train.preemption import EXIT_CODE, Preempted

    try:
        if config.train.seeds:
            _print_group(fit_seeds(config))
            return
        result = fit(config)
    except Preempted as stop:
        print(f"cmamba: told to stop (SIGTERM): {stop}; the same command with --resume continues", file=sys.stderr)
        sys.exit(EXIT_CODE)
    if is_lead():
        _print_metrics("test", result.metrics["test"])
        print(f"report: {result.report}")


def _print_group(group: Any) -> None:
    for split, mean in group.mean.items():
        values = "  ".join(f"{name} {value:.4f} +- {group.std[split][name]:.4f}" for name, value in mean.items())
        print(f"{split}, {len(group.runs)} seeds, mean +- standard deviation: {values}")
    print(f"runs: {group.run_dir}")


def _crossval(words: list[str]) -> None:
    config = _parse_config("crossval", words)
    from cmamba_jax.train import cross_validate

    result = cross_validate(config, command=" ".join(["crossval", *words]))
    width = max(map(len, result.mean))
    heads = [f"fold {i}" for i in range(len(result.folds))]
    print(" " * width, *(f"{head:>8}" for head in [*heads, "mean", "std"]))
    for name in result.mean:
        values = [*(fold[name] for fold in result.folds), result.mean[name], result.std[name]]
        print(f"{name:<{width}}", *(f"{value:8.4f}" for value in values))
    if result.seed_std:
        print(f"folds: means over {len(result.seeds[0])} seeds; standard deviation over the seeds of the mean:")
        print("  ".join(f"{name} {value:.4f}" for name, value in result.seed_std.items()))
    print(f"written to {result.path}")


def _sweep(words: list[str]) -> None:
    command = " ".join(["sweep", *words])
    path, words = _config_path("sweep", words)
    parser = argparse.ArgumentParser("cmamba sweep", add_help=False, allow_abbrev=False)
    parser.add_argument("--grid", nargs="+", default=[])
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--folds", choices=typing.get_args(typing.get_type_hints(SweepConfig)["folds"]))
    parser.add_argument("--widths", choices=typing.get_args(typing.get_type_hints(SweepConfig)["widths"]))
    own, words = parser.parse_known_args(words)
    from cmamba_jax.train import sweep

    found = load_config(path, kinds=(SweepConfig, ExperimentConfig))
    plan = found if isinstance(found, SweepConfig) else SweepConfig(name=f"{found.name}_sweep", base=found)
    if own.grid:
        plan = dataclasses.replace(plan, rows=sweep.grid(dict(map(_grid_values, own.grid))))
    elif not plan.rows:
        raise UserError(f"{path} has no rows: give fields to vary, such as `--grid model.coupling=shared,full`")
    plan = dataclasses.replace(
        plan,
        folds=own.folds or plan.folds,
        widths=own.widths or plan.widths,
        base=_override("sweep", path, plan.base, words),
    )
    result = sweep.run_sweep(plan, only=own.only, command=command)
    print(result.table, end="")
    print(f"written to {result.folder}/table.md and table.csv")


def _grid_values(word: str) -> tuple[str, tuple[Any, ...]]:
    """FIELD=A,B as the field and its values; what is no JSON is a string."""
    name, equals, values = word.partition("=")
    if not equals or not values:
        raise UserError(f"--grid: expected FIELD=VALUE,VALUE such as model.d_state=16,32, got {word!r}")

    def decoded(value: str) -> Any:
        try:
            return json.loads(value)
        except ValueError:
            return value

    return name.replace("-", "_"), tuple(map(decoded, values.split(",")))


def _results(words: list[str]) -> None:
    def results(
        runs: Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUNS")] = pathlib.Path("runs"),
        /,
        records: pathlib.Path = pathlib.Path("results"),
        configs: pathlib.Path = pathlib.Path("configs"),
        output: pathlib.Path = pathlib.Path("RESULTS.md"),
        readme: pathlib.Path = pathlib.Path("README.md"),
    ) -> None:
        """Collect the records of finished sweeps, cross-validations and benchmarks, and write the tables of all.

        Args:
            runs: Folder of runs, whose records are collected, at any depth.
            records: Folder that keeps the records.
            configs: Folder of the configurations; those of the paper that were not run are listed.
            output: Markdown file to write.
            readme: Markdown file whose marked tables are written anew, if it exists.
        """
        from cmamba_jax.results import readme as tables
        from cmamba_jax.results import records as store
        from cmamba_jax.results.sweeps import write_results

        new = store.collect(runs, records)
        found = store.read_all(records)
        plans = {path: load_config(path, kinds=(SweepConfig, ExperimentConfig)) for path in configs.rglob("*.py")}
        ran, missing = write_results(found, plans, output)
        print(f"{records}: {len(found)} records, {len(new)} of them from {runs}")
        print(f"{output}: {ran} tables, {missing} configurations not run")
        if readme.exists():
            print(f"{readme}: {tables.write_readme(found, readme)} tables")

    tyro.cli(results, args=words, prog="cmamba results")


def _info(words: list[str]) -> None:
    config = _parse_config("info", words)
    from cmamba_jax.train.describe import describe

    print(json.dumps(describe(config), indent=2))


def _eval(words: list[str]) -> None:
    def evaluate(
        run_dir: Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")],
        /,
        split: Literal["train", "valid", "test"] = "test",
        checkpoint: Literal["best", "last"] = "best",
        missing: MissingConfig = MissingConfig(),  # noqa: B008 (frozen)
    ) -> None:
        """Score a trained model on a split of its data set, whole or with part of it removed.

        Args:
            run_dir: Folder of the run, such as runs/watch/001, or of an exported model.
            split: Which part of the data.
            checkpoint: Which parameters.
            missing: What is removed from the samples, such as --missing.kind modality --missing.rate 0.3.
        """
        from cmamba_jax.deploy.pretrained import load_model

        _print_metrics(split, load_model(run_dir, which=checkpoint).evaluate(split, missing=missing).metrics)

    tyro.cli(evaluate, args=words, prog="cmamba eval")


def _predict(words: list[str]) -> None:
    def predict(
        run_dir: Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")],
        input: Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="INPUT")],
        /,
        output: pathlib.Path | None = None,
        checkpoint: Literal["best", "last"] = "best",
    ) -> None:
        """Predict sequences from .npz files, each with one array [L, F] for every modality.

        Args:
            run_dir: Folder of the run, such as runs/watch/001, or of an exported model.
            input: An .npz file, or a folder of them.
            output: File to write, .csv or .jsonl; without it, CSV goes to the screen.
            checkpoint: Which parameters.
        """
        kind = "csv" if output is None else output.suffix.removeprefix(".")
        if kind not in ("csv", "jsonl"):
            raise UserError(f"{output}: expected a name that ends in .csv or .jsonl")
        from cmamba_jax.deploy.pretrained import load_model
        from cmamba_jax.train.inference import format_predictions

        run = load_model(run_dir, which=checkpoint)
        text = format_predictions(run.predict(input), run.info, kind)
        if output is None:
            print(text, end="")
        else:
            output.write_text(text, encoding="utf-8")

    tyro.cli(predict, args=words, prog="cmamba predict")


def _deploy(name: str) -> Callable[[list[str]], None]:
    def run(words: list[str]) -> None:
        commands = importlib.import_module("cmamba_jax.deploy.commands")
        getattr(commands, name)(words)

    return run


def _bench(words: list[str]) -> None:
    known = ("scan", "conv", "efficiency", "step", "seeds", "scaling", "stream", "tpu-static")
    if not words or words[0] not in known:
        raise UserError(f"bench: expected one of {', '.join(known)}, got {words[0] if words else 'nothing'!r}")
    importlib.import_module(f"cmamba_jax.bench.{words[0].replace('-', '_')}").main(words[1:])


def _doctor(words: list[str]) -> None:
    def doctor() -> None:
        """Print versions and devices, and check every implementation of the scan on the default device."""
        from cmamba_jax.bench.doctor import examine

        sys.exit(0 if examine() else 1)

    tyro.cli(doctor, args=words, prog="cmamba doctor")


_COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": _train,
    "crossval": _crossval,
    "sweep": _sweep,
    "results": _results,
    "info": _info,
    "eval": _eval,
    "predict": _predict,
    "explain": _deploy("explain"),
    "export": _deploy("export"),
    "convert": _deploy("convert"),
    "stream": _deploy("stream"),
    "bench": _bench,
    "doctor": _doctor,
}


def _parse_config(command: str, words: list[str]) -> ExperimentConfig:
    """The configuration of a file with the overrides of the command line."""
    path, overrides = _config_path(command, words)
    return _override(command, path, load_config(path), overrides)


def _config_path(command: str, words: list[str]) -> tuple[pathlib.Path, list[str]]:
    """The file that the words start with, and the other words."""
    if words[:1] in (["-h"], ["--help"]):
        print(_USAGE, end="")
        sys.exit(0)
    if not words or words[0].startswith("-"):
        raise UserError(
            f"{command} needs a CONFIG first: `cmamba {command} configs/watch.py`; "
            f"`cmamba {command} configs/watch.py --help` lists its fields"
        )
    return pathlib.Path(words[0]), words[1:]


def _override(command: str, path: pathlib.Path, default: ExperimentConfig, overrides: list[str]) -> ExperimentConfig:
    aliases = {
        "--resume": "--train.resume",
        "--run-dir": "--train.run-dir",
        "--run_dir": "--train.run-dir",
        "--seeds": "--train.seeds",
    }
    overrides = [
        "=".join([aliases.get(name, name), *value]) for name, *value in (word.split("=", 1) for word in overrides)
    ]
    return tyro.cli(
        tyro.conf.AvoidSubcommands[ExperimentConfig],
        default=default,
        args=overrides,
        prog=f"cmamba {command} {path}",
        description=f"Fields of {path}; defaults are the file's. --resume, --run-dir and --seeds need no 'train.' "
        "before them.",
    )


def load_config(path: pathlib.Path, kinds: tuple[type, ...] = (ExperimentConfig,)) -> Any:
    """Runs the function ``config`` of a Python file.

    Args:
        path: the file.
        kinds: what the function may return: an ExperimentConfig, or for sweeps a SweepConfig.

    Raises:
        UserError: there is no such file or function, it fails, or it returns something else.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a Python file with config() -> ExperimentConfig")
    try:
        make = runpy.run_path(str(path)).get("config")
        result = make() if make else None
    except UserError:
        raise
    except Exception as error:
        raise UserError(_located(path, error)) from error
    if make is None:
        raise UserError(f"{path} has no function config(); expected `def config() -> ExperimentConfig`")
    if not isinstance(result, kinds):
        expected = " or ".join(f"a{'n' * (kind is ExperimentConfig)} {kind.__name__}" for kind in kinds)
        hint = "; run it with `cmamba sweep`" if isinstance(result, SweepConfig) else ""
        raise UserError(f"{path}: config() returned {type(result).__name__}, expected {expected}{hint}")
    check(result.base if isinstance(result, SweepConfig) else result)
    return result


def _located(path: pathlib.Path, error: Exception) -> str:
    """What went wrong in a configuration file and where, with a guess at a misspelt field."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    line = error.lineno if isinstance(error, SyntaxError) else (lines or [1])[-1]
    message = f"{path}, line {line}: {type(error).__name__}: {error}"
    if misspelt := re.search(r"unexpected keyword argument '(\w+)'", str(error)):
        classes = filter(dataclasses.is_dataclass, vars(cmamba_jax.config).values())
        names = {field.name for cls in classes for field in dataclasses.fields(cls)}
        if close := difflib.get_close_matches(misspelt[1], names, n=1):
            message += f"; did you mean {close[0]!r}?"
    return message


def _print_metrics(split: str, metrics: dict[str, Any]) -> None:
    print(f"{split}: " + "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
