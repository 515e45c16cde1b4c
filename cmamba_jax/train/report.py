"""The report of a run: one self-contained HTML page, its pictures as PNG files and the metrics as JSON."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import resources
from typing import Any

import jinja2
import numpy as np
from jaxtyping import Float, Shaped
from matplotlib.figure import Figure
from sklearn import metrics as sklearn_metrics

from cmamba_jax.config import ExperimentConfig
from cmamba_jax.data import DataInfo
from cmamba_jax.metrics import METRICS, decide, metric_names
from cmamba_jax.models import CouplingTable
from cmamba_jax.train import figures
from cmamba_jax.train.figures import DARK, LIGHT, Theme

MAX_TARGETS = 6
"""Regression targets that get a scatter plot."""

_LABELS = {
    "loss": "loss",
    "accuracy": "accuracy",
    "weighted_f1": "weighted F1",
    "macro_f1": "macro F1",
    "micro_f1": "micro F1",
    "f1": "F1",
    "auc": "AUC",
    "mae": "MAE",
    "rmse": "RMSE",
    "corr": "Pearson's r",
    "has0_acc2": "Acc-2 with zero",
    "has0_f1": "F1 with zero",
    "non0_acc2": "Acc-2 without zero",
    "non0_f1": "F1 without zero",
    "acc2": "Acc-2",
    "acc3": "Acc-3",
    "acc5": "Acc-5",
    "acc7": "Acc-7",
    "mmsa_non0_acc2": "Acc-2 as MMSA has it",
    "mmsa_non0_f1": "F1 as MMSA has it",
}
SHARES = _LABELS.keys() - {"loss", "mae", "rmse", "corr"}
"""Metrics that are shown in percent."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """One picture of the report.

    Attributes:
        name: of its file, without the suffix.
        title: heading.
        caption: what one sees.
        draw: makes the figure in the colours of a theme.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[Theme], Figure]


def write_report(
    run_dir: str | os.PathLike,
    *,
    config: ExperimentConfig,
    info: DataInfo,
    metrics: Mapping[str, Mapping[str, float]],
    history: Sequence[Mapping[str, Any]],
    logits: Float[np.ndarray, "n K"],
    labels: Shaped[np.ndarray, "n ..."],
    coupling_tables: Sequence[CouplingTable],
    facts: Mapping[str, str],
) -> pathlib.Path:
    """Writes RUN_DIR/report: index.html (self-contained), metrics.json and the pictures.

    Args:
        run_dir: folder of the run.
        config: resolved configuration.
        info: description of the data.
        metrics: per split ("train", "valid", "test") the final metrics by name.
        history: records of metrics.jsonl, see `writers.read_history`.
        logits: the n predictions of the test split that count, float [n, K].
        labels: their labels, as `metrics.evaluate` takes them.
        coupling_tables: `CoupledMamba.coupling_tables()`; empty when there is no coupling.
        facts: what else a reader wants to know, such as versions, device, parameters and time.

    Returns:
        The path of index.html.
    """
    folder = pathlib.Path(run_dir) / "report"
    folder.mkdir(parents=True, exist_ok=True)
    pictures = (
        *_learning_curves(config, info, history),
        *_predictions(config, info, logits, labels),
        *_couplings(info, coupling_tables),
    )
    page = _environment().from_string(resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8"))
    html = page.render(
        config=config,
        info=info,
        run=pathlib.Path(run_dir).resolve().name,
        n_predictions=len(logits),
        metrics=metrics,
        names=list(dict.fromkeys(name for values in metrics.values() for name in values)),
        pictures=[_render(picture, folder) for picture in pictures],
        config_tables=_config_tables(config),
        facts=facts,
    )
    finite = {s: {k: v if math.isfinite(v) else None for k, v in values.items()} for s, values in metrics.items()}
    (folder / "metrics.json").write_text(json.dumps(finite, indent=2) + "\n", encoding="utf-8")
    path = folder / "index.html"
    path.write_text(html, encoding="utf-8")
    return path


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"metric_name": _metric_name, "metric_value": _metric_value}
    return environment


def _metric_name(name: str) -> str:
    label = _LABELS.get(name, name)
    return label[0].upper() + label[1:]


def _metric_value(value: float, name: str) -> str:
    if not math.isfinite(value):
        return "undefined"
    return f"{100 * value:.1f}%" if name in SHARES else f"{value:.4g}"


def _render(picture: Picture, folder: pathlib.Path) -> dict[str, Any]:
    """Draws a picture for both themes, saves the light one and returns what the page shows."""
    figure = picture.draw(LIGHT)
    light, dark = figures.to_png(figure), figures.to_png(picture.draw(DARK))
    (folder / f"{picture.name}.png").write_bytes(light)
    width, height = (round(100 * inches) for inches in figure.get_size_inches())
    return {
        "title": picture.title,
        "caption": picture.caption,
        "light": figures.to_data_uri(light),
        "dark": figures.to_data_uri(dark),
        "width": width,
        "height": height,
    }


def _learning_curves(config: ExperimentConfig, info: DataInfo, history: Sequence[Mapping]) -> Iterator[Picture]:
    monitor, best = config.train.monitor, None
    monitored = [r for r in history if r["split"] == "valid" and math.isfinite(r.get(monitor, math.nan))]
    if monitored:
        best = {"min": min, "max": max}[METRICS[monitor]](monitored, key=lambda record: record[monitor])
    for name in ("loss", metric_names(info.task, config.evaluation)[0]):
        if not any(name in record for record in history):
            continue
        label = _metric_name(name)
        caption = f"{label} over the training steps."
        if any(name in record for record in history if record["split"] == "train"):
            caption += " Training: the mean of each epoch; the faint line shows every record."
        if best:
            value = _metric_value(best[monitor], monitor)
            caption += (
                f" The dashed line marks epoch {best['epoch']} (step {best['step']:,}), whose validation "
                f"{_LABELS[monitor]}, {value}, is the best: its checkpoint is the one that is tested."
            )
        yield Picture(
            name,
            label,
            caption,
            partial(figures.learning_curves, history, name, label=label, best_step=best and best["step"]),
        )


def _predictions(config: ExperimentConfig, info: DataInfo, logits: np.ndarray, labels: np.ndarray) -> Iterator[Picture]:
    names = list(info.label_names) or [str(k) for k in range(logits.shape[1])]
    if not np.isfinite(logits).all():
        return
    if info.task.kind == "classification":
        yield _confusion(sklearn_metrics.confusion_matrix(labels, logits.argmax(1), labels=range(len(names))), names)
    elif info.task.kind == "multilabel":
        yield _label_scores(decide(logits, config.evaluation.thresholds), labels > 0.5, names)
    else:
        shown = names[:MAX_TARGETS] if logits.shape[1] > 1 else [""]
        caption = "Each point is one prediction for the test data; on the dashed line it equals the target."
        if len(shown) < logits.shape[1]:
            caption += f" The first {len(shown)} of {logits.shape[1]} targets are shown."
        yield Picture(
            "scatter",
            "Predictions and targets",
            caption,
            partial(figures.regression_scatter, logits, labels, shown),
        )


def _confusion(counts: np.ndarray, names: Sequence[str]) -> Picture:
    right, total = int(np.trace(counts)), int(counts.sum())
    wrong = counts - np.diag(np.diag(counts))
    caption = (
        f"Rows are the true classes, columns the predictions; numbers count, the colour is the share of its row. "
        f"{right:,} of {total:,} predictions lie on the diagonal, where both agree."
    )
    if wrong.any():
        true, predicted = np.unravel_index(wrong.argmax(), wrong.shape)
        caption += (
            f" The most frequent mistake is \u201c{names[predicted]}\u201d for \u201c{names[true]}\u201d "
            f"({wrong[true, predicted]:,} of {counts[true].sum():,})."
        )
    return Picture(
        "confusion_matrix",
        "Confusion matrix",
        caption,
        partial(figures.confusion_matrix, counts, names),
    )


def _label_scores(predicted: np.ndarray, true: np.ndarray, names: Sequence[str]) -> Picture:
    scores = np.asarray(sklearn_metrics.f1_score(true, predicted, average=None, zero_division=np.nan))
    caption = "F1 of each label. A label without a bar occurs neither in the test data nor in the predictions."
    return Picture("label_f1", "F1 per label", caption, partial(figures.label_scores, scores, names, label="F1"))


def _couplings(info: DataInfo, tables: Sequence[CouplingTable]) -> Iterator[Picture]:
    modalities = list(info.features)
    if len(modalities) == 1:  # Nothing to couple.
        return
    for kind in dict.fromkeys(table.kind for table in tables):
        chosen = [table for table in tables if table.kind == kind]
        several = len({table.direction for table in chosen}) > 1
        panels = {f"layer {t.layer + 1}" + (f", {t.direction}" if several else ""): t.values for t in chosen}
        yield {"gain": _gains, "weights": _weights, "layer": _layer_norms}[kind](panels, modalities)


def _gains(panels: Mapping[str, np.ndarray], modalities: Sequence[str]) -> Picture:
    title, gain = max(panels.items(), key=lambda item: np.ptp(item[1]))
    modality, state = np.unravel_index(gain.argmax(), gain.shape)
    return Picture(
        "coupling_gain",
        "Gain of each modality",
        "How strongly the summed state of all modalities enters each modality's next state (g in Eq. 9), for every "
        f"state of every layer; 1/{len(modalities)}, an even share, has the neutral colour. "
        f"The most uneven layer is {title}; its strongest gain is {gain.max():.2f} ({modalities[modality]}, "
        f"state {state}).",
        partial(figures.coupling_gains, panels, modalities),
    )


def _weights(panels: Mapping[str, np.ndarray], modalities: Sequence[str]) -> Picture:
    foreign = {title: np.where(np.eye(len(w), dtype=bool), -np.inf, w) for title, w in panels.items()}
    title, strongest = max(foreign.items(), key=lambda item: item[1].max())
    caption = (
        "The part that each modality's previous state (columns) has in each modality's next state (rows; W in Eq. 5)."
    )
    to, source = np.unravel_index(strongest.argmax(), strongest.shape)
    caption += (
        f" The strongest link between two modalities is from {modalities[source]} to {modalities[to]} in "
        f"{title} ({strongest.max():.2f})."
    )
    return Picture(
        "coupling_weights",
        "Coupling weights",
        caption,
        partial(figures.coupling_matrices, panels, modalities, at_least=1.0),
    )


def _layer_norms(panels: Mapping[str, np.ndarray], modalities: Sequence[str]) -> Picture:
    others = {title: np.where(np.eye(len(norms), dtype=bool), np.nan, norms) for title, norms in panels.items()}
    return Picture(
        "coupling_layer",
        "Coupling between layers",
        "Norm of the linear map that adds each modality's output (columns) to each modality's input of the next "
        "layer (rows).",
        partial(figures.coupling_matrices, others, modalities),
    )


def _config_tables(config: ExperimentConfig) -> dict[str, list[tuple[str, str, bool]]]:
    """Per section of the configuration, rows of name, value and whether the value differs from the default."""

    def rows(section: Any, prefix: str = "") -> Iterator[tuple[str, str, bool]]:
        default = type(section)()
        for field in dataclasses.fields(section):
            value, name = getattr(section, field.name), prefix + field.name
            if dataclasses.is_dataclass(value):
                yield from rows(value, name + ".")
            else:
                text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
                yield name, text or "\u2013", value != getattr(default, field.name)

    sections = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {name: list(rows(section)) for name, section in sections.items() if dataclasses.is_dataclass(section)}
