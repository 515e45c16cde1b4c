"""Tables of experiments: each row is a configuration, its seeds and folds are runs, and a row is never run twice."""

import csv
import dataclasses
import difflib
import io
import itertools
import json
import pathlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from cmamba_jax.config import ExperimentConfig, MissingConfig, SweepConfig, SweepRow
from cmamba_jax.config_json import check, to_dict
from cmamba_jax.data import DataInfo
from cmamba_jax.errors import UserError
from cmamba_jax.models.size import abstract_params, count, match_width
from cmamba_jax.results.records import describe
from cmamba_jax.train import runs
from cmamba_jax.train.crossval import cross_validate
from cmamba_jax.train.experiment import fit, load_splits
from cmamba_jax.train.inference import load_run
from cmamba_jax.train.report import SHARES
from cmamba_jax.train.seeds import fit_seeds, statistics

FUSIONS = (
    SweepRow("Coupled, shared"),
    SweepRow("Coupled, full", (("model.coupling", "full"),)),
    SweepRow("Layer coupling of the published code", (("model.coupling", "released"),)),
    SweepRow("Mamba, no coupling", (("model.coupling", "independent"),)),
    SweepRow("Average, one Mamba", (("model.coupling", "independent"), ("model.early_fusion", "average"))),
    SweepRow("Concatenation, one Mamba", (("model.coupling", "independent"), ("model.early_fusion", "concat"))),
    SweepRow("Average, no layers", (("model.n_layers", 0), ("model.fusion", "mean"))),
    SweepRow("Concatenation, no layers", (("model.n_layers", 0), ("model.fusion", "concat"))),
    SweepRow("Cross-attention", (("model.coupling", "cross_attention"),)),
)
"""The couplings, and the baselines of the paper's Tables 8 and 11, which does not say where it averages and
concatenates: before one Mamba or, without any layer, before the head."""
MISSING_CURVES = tuple(MissingConfig(kind, rate) for kind in ("modality", "element") for rate in (0.1, 0.3, 0.5, 0.7))
"""Whole modalities, and single numbers as in the paper's Table 12, missing at test."""
_VOLATILE = ("output", "run_dir", "resume", "progress")


@dataclasses.dataclass(frozen=True)
class SweepResult:
    """A finished sweep.

    Attributes:
        folder: holds sweep.json, table.csv and table.md, and a folder for each row.
        rows: what sweep.json holds of each row, see `run_sweep`.
        table: the Markdown table.
    """

    folder: pathlib.Path
    rows: list[dict[str, Any]]
    table: str


def grid(fields: Mapping[str, Sequence[object]]) -> tuple[SweepRow, ...]:
    """All combinations of values, the last field changing fastest.

    Example:
        >>> [row.label for row in grid({"model.coupling": ("shared", "full"), "model.d_state": (16,)})]
        ['coupling shared, d_state 16', 'coupling full, d_state 16']

    Args:
        fields: dotted name of a field of an ExperimentConfig -> its values.
    """
    rows = []
    for values in itertools.product(*fields.values()):
        changes = tuple(zip(fields, values, strict=True))
        rows.append(SweepRow(", ".join(f"{name.rpartition('.')[2]} {value}" for name, value in changes), changes))
    return tuple(rows)


def apply(config: ExperimentConfig, changes: Sequence[tuple[str, object]]) -> ExperimentConfig:
    """The configuration with other values of some fields, named by their dotted paths.

    Raises:
        UserError: there is no such field, or it cannot have that value.
    """
    for path, value in changes:
        config = _replaced(config, path.split("."), value, path)
    return check(config)


def _replaced(part: Any, names: list[str], value: object, path: str) -> Any:
    known = [field.name for field in dataclasses.fields(part)] if dataclasses.is_dataclass(part) else []
    if names[0] not in known:
        close = difflib.get_close_matches(names[0], known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; expected one of {', '.join(known) or 'no field here'}"
        raise UserError(f"sweep: there is no field {path!r}{hint}")
    new = _replaced(getattr(part, names[0]), names[1:], value, path) if names[1:] else value
    return dataclasses.replace(part, **{names[0]: new})


def run_sweep(
    sweep: SweepConfig,
    *,
    only: Sequence[str] = (),
    command: str = "",
    message: Callable[[str], None] = print,
) -> SweepResult:
    """Runs the rows that have not been run yet, one after the other, and writes the tables after each.

    The folder is `base.train.run_dir`, or OUTPUT/NAME. Called again, finished rows are taken from sweep.json and an
    unfinished one continues from its last checkpoint.

    A row in sweep.json: "label", "changes", "paper"; "d_model" and "parameters"; "runs", how many seeds or folds the
    mean is over; "test" and "std", mean and standard deviation of the test metrics; "valid", mean validation metrics
    (not of cross-validations); "test_chosen", see `SeedsResult`; "missing", scores with missing data; "seconds";
    "settings", the whole configuration.

    Args:
        sweep: base and rows.
        only: folder names of the rows to run now, such as "coupled_shared"; empty: all.
        command: what the command line says after ``cmamba``, for the record.
        message: receives a line before each row.

    Raises:
        UserError: two rows have the same label, a row's changes do not fit, or the folder holds a row of this label
            with other settings.
    """
    labels = [row.label for row in sweep.rows]
    slugs = [_slug(label) for label in labels]
    if not labels or len(set(slugs)) < len(slugs) or "" in slugs:
        raise UserError(f"sweep {sweep.name}: expected rows with different labels, got {labels}")
    if unknown := set(only) - set(slugs):
        raise UserError(f"sweep {sweep.name}: no row {', '.join(sorted(unknown))}; the rows are {', '.join(slugs)}")
    configs = _row_configs(sweep)
    train = sweep.base.train
    folder = pathlib.Path(train.run_dir or pathlib.Path(train.output) / sweep.name).expanduser()
    path = folder / "sweep.json"
    saved = runs.read_json(path)["rows"] if path.exists() else []
    done = {row["label"]: row for row in saved}
    for label, (config, _) in zip(labels, configs, strict=True):
        if label in done and done[label]["settings"] != _settings(config):
            raise UserError(f"{folder} holds row {label!r} with other settings; choose another --run-dir, or delete it")

    folder.mkdir(parents=True, exist_ok=True)
    about = {
        **describe("sweep", command),
        "name": sweep.name,
        "widths": sweep.widths,
        "folds": sweep.folds,
        "metrics": list(sweep.metrics),
        "monitor": train.monitor,
        "paper": sweep.base.paper,
    }
    for number, (row, slug, (config, parameters)) in enumerate(zip(sweep.rows, slugs, configs, strict=True)):
        if row.label not in done and slug not in (only or slugs):
            continue
        if row.label not in done:
            message(f"row {number + 1}/{len(labels)}: {row.label} ({parameters:,} parameters)")
            own = folder / slug
            resume = (own / "config.json").exists()
            config = dataclasses.replace(
                config, train=dataclasses.replace(config.train, run_dir=str(own), resume=resume)
            )
            done[row.label] = {
                "label": row.label,
                "changes": [list(change) for change in row.changes],
                "d_model": config.model.d_model,
                "parameters": parameters,
                **_run(config, sweep.folds),
                "missing": _score_missing(own, sweep.missing),
                "settings": _settings(config),
            }
        done[row.label]["paper"] = row.paper
        _write(folder, about, [done[label] for label in labels if label in done])
        # Compiled programs take many memory mappings each, and a process may have 65,530: hundreds of runs would crash.
        jax.clear_caches()
    rows = [done[label] for label in labels if label in done]
    return SweepResult(folder, rows, markdown(about, rows))


def _row_configs(sweep: SweepConfig) -> list[tuple[ExperimentConfig, int]]:
    """Configuration and number of parameters of each row."""
    infos: dict[Any, DataInfo] = {}

    def info_of(config: ExperimentConfig) -> DataInfo:
        if config.data not in infos:
            infos[config.data] = load_splits(config).info
        return infos[config.data]

    def size(config: ExperimentConfig) -> int:
        info = info_of(config)
        return count(abstract_params(config.model, info.features, info.task))

    result = []
    for row in sweep.rows:
        config = apply(sweep.base, row.changes)
        if sweep.widths == "equal_parameters":
            info = info_of(config)
            model = match_width(config.model, info.features, info.task, size(sweep.base))
            config = dataclasses.replace(config, model=model)
        result.append((config, size(config)))
    return result


def _run(config: ExperimentConfig, folds: str) -> dict[str, Any]:
    """Runs one row: what sweep.json holds of its results."""
    started = time.perf_counter()
    values: dict[str, Any]
    if folds == "all":
        crossed = cross_validate(config)
        values = {"runs": len(crossed.folds), "test": crossed.mean, "std": crossed.std, "seed_std": crossed.seed_std}
    elif config.train.seeds:
        group = fit_seeds(config)
        values = {"runs": len(group.runs), "test": group.mean["test"], "std": group.std["test"]}
        values |= {"valid": group.mean["valid"], "test_chosen": group.test_chosen}
    else:
        result = fit(config)
        values = {"runs": 1, "test": result.metrics["test"], "valid": result.metrics["valid"], "std": {}}
    return values | {"seconds": round(time.perf_counter() - started, 1)}


def _score_missing(folder: pathlib.Path, kinds: Sequence[MissingConfig]) -> list[dict[str, Any]]:
    """Test metrics with part of the data missing, mean and deviation over the runs of a row."""
    if not kinds:
        return []
    found = [path.parent for path in sorted(folder.rglob("config.json")) if (path.parent / "report").exists()]
    scores = []
    for run_dir in found:
        run = load_run(run_dir)
        splits = load_splits(run.config)
        scores.append([run.evaluate("test", splits, missing=missing).metrics for missing in kinds])
    pairs = (statistics(own) for own in zip(*scores, strict=True))
    return [
        {"kind": missing.kind, "rate": missing.rate, "test": mean, "std": std}
        for missing, (mean, std) in zip(kinds, pairs, strict=True)
    ]


def _settings(config: ExperimentConfig) -> dict[str, Any]:
    values = to_dict(config)
    for name in _VOLATILE:
        del values["train"][name]
    del values["paper"]
    return json.loads(json.dumps(values))  # As a file holds them.


def _slug(label: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "_", label.lower()).strip("_.")


def _write(folder: pathlib.Path, about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    runs.write_json(folder / "sweep.json", about | {"rows": rows})
    (folder / "table.md").write_text(markdown(about, rows), encoding="utf-8")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = list(rows[0]["test"])
    writer.writerow(
        ["label", "parameters", "d_model", "runs", *(f"{n}{end}" for n in names for end in ("", "_std")), "paper"]
    )
    for row in rows:
        numbers = [value for n in names for value in (row["test"][n], row["std"].get(n, ""))]
        writer.writerow([row["label"], row["parameters"], row["d_model"], row["runs"], *numbers, row["paper"]])
    (folder / "table.csv").write_text(text.getvalue(), encoding="utf-8")


def markdown(about: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of a sweep: test metrics, mean and standard deviation; shares in percent.

    Args:
        about: "metrics" (columns; empty: all) and "monitor" of the sweep.
        rows: see `run_sweep`.
    """
    names = about["metrics"] or [name for name in rows[0]["test"] if name != "loss"]
    heads = ["", "parameters", *(name.replace("_", " ") for name in names)]
    shows_valid = all("valid" in row for row in rows)
    shows_chosen = any(row.get("test_chosen") for row in rows)
    shows_paper = any(row["paper"] for row in rows)
    heads += [f"validation {about['monitor']}"] * shows_valid
    heads += [f"{heads[2]}, epoch chosen on test"] * shows_chosen + ["paper"] * shows_paper
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [row["label"], f"{row['parameters']:,}"]
        cells += [shown(name, row["test"][name], row["std"].get(name)) for name in names]
        cells += [shown(about["monitor"], row["valid"][about["monitor"]])] if shows_valid else []
        if shows_chosen:
            chosen = row["test_chosen"].get(names[0], [])
            cells.append(shown(names[0], sum(chosen) / len(chosen)) if chosen else "")
        cells += [row["paper"]] * shows_paper
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, *_missing_table(rows, names[0])]) + "\n"


def _missing_table(rows: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    """One column for each kind and rate of missing data; nothing where none was scored."""
    rows = [row for row in rows if row.get("missing")]
    if not rows:
        return []
    heads = [f"{score['kind']} {score['rate']:g}" for score in rows[0]["missing"]]
    lines = ["", f"Test {name.replace('_', ' ')} with missing data, kind and rate:", ""]
    lines += ["|  | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for row in rows:
        cells = [shown(name, score["test"][name], score["std"][name]) for score in row["missing"]]
        lines.append("| " + " | ".join([row["label"], *cells]) + " |")
    return lines


def shown(name: str, value: float, std: float | None = None) -> str:
    """A metric for a table: shares in percent with one decimal, others with three."""
    scale, digits = (100, 1) if name in SHARES else (1, 3)
    return f"{scale * value:.{digits}f}" + (f" ± {scale * std:.{digits}f}" if std else "")
