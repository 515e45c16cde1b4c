"""RESULTS.md: the tables of all sweeps that were run, and the configurations that were not."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from cmamba_jax.config import ExperimentConfig, SweepConfig
from cmamba_jax.results.records import Record
from cmamba_jax.train.sweep import markdown

_HEAD = """\
# Results

Written by `cmamba results` from the records in results/; do not edit. Epochs, and whatever else was chosen, were chosen
on validation data; the test data was read once, at the end; except where a column or the note above a table says
otherwise. Values are means over the runs of a row ± their standard deviation (n - 1); shares are in percent. "Equal
parameters" means that each row takes the width that brings its number of parameters within 5% of the others'.
"""


def write_results(
    records: Sequence[Record], configs: Mapping[pathlib.Path, ExperimentConfig | SweepConfig], output: pathlib.Path
) -> tuple[int, int]:
    """Writes the Markdown file.

    Experiments without a `paper` are not listed as missing; sweeps always are.

    Args:
        records: those of the kind "sweep" count.
        configs: configurations by file; those without a sweep of their name count as not run.
        output: file to write.

    Returns:
        Number of tables, and of configurations that were not run.
    """
    sweeps = [record for record in records if record["kind"] == "sweep"]
    names = {sweep["name"] for sweep in sweeps}
    missing = {path: config for path, config in sorted(configs.items()) if not _was_run(config, names)}
    planned = {config.name: config for config in configs.values() if isinstance(config, SweepConfig)}
    parts = [_HEAD, "## Run here\n", *(_section(sweep, planned.get(sweep["name"])) for sweep in sweeps)]
    parts.append("## Not run here\n")
    if missing:
        parts.append("| configuration | reported by the paper (arXiv 2405.18014) |\n|---|---|")
        parts[-1] += "".join(f"\n| `{path.as_posix()}` | {_paper(config)} |" for path, config in missing.items()) + "\n"
    else:
        parts.append("Every configuration was run.\n")
    output.write_text("\n".join(parts), encoding="utf-8")
    return len(sweeps), len(missing)


def _was_run(config: ExperimentConfig | SweepConfig, names: set[str]) -> bool:
    """A sweep of this name, or one that `cmamba sweep` makes of an experiment of this name."""
    if isinstance(config, ExperimentConfig) and not config.paper:
        return True  # No experiment of the paper: nothing is owed.
    return config.name in names or f"{config.name}_sweep" in names


def _paper(config: ExperimentConfig | SweepConfig) -> str:
    if isinstance(config, ExperimentConfig):
        return config.paper
    rows = [f"{row.label}: {row.paper}" for row in config.rows if row.paper]
    return "; ".join(([config.base.paper] if config.base.paper and not rows else []) + rows)


def _section(sweep: Mapping[str, Any], planned: SweepConfig | None) -> str:
    rows = sweep["rows"]
    facts = [f"`{sweep['command']}`"] if sweep["command"] else []
    count = sorted({row["runs"] for row in rows})
    of = "fold" if sweep["folds"] == "all" else "seed"
    facts.append(f"{' or '.join(map(str, count))} {of}{'s' * (count != [1])} a row")
    facts += ["equal parameters"] if sweep["widths"] == "equal_parameters" else []
    facts.append(f"{sum(row['seconds'] for row in rows) / 60:.0f} minutes on {sweep['device']}")
    facts.append(sweep["versions"])
    lines = [f"### {sweep['name']}\n", "; ".join(facts) + ".\n"]
    if sweep["paper"]:
        lines.append(f"Paper: {sweep['paper']}\n")
    if planned and planned.note:
        lines.append(f"{planned.note}\n")
    lines.append(markdown(sweep, rows))
    ran = {row["label"] for row in rows}
    if left := [row.label for row in (planned.rows if planned else ()) if row.label not in ran]:
        lines.append(f"Rows not run: {'; '.join(left)}.\n")
    return "\n".join(lines)
