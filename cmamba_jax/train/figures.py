"""The figures of the report: from arrays to matplotlib figures, without pyplot or any global state.

Each function draws for one `Theme`, so that the report has pictures for light and for dark pages. The colours are
told apart with every common colour blindness (blue and orange; heat maps that change in lightness).
"""

import base64
import dataclasses
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import matplotlib
import numpy as np
from jaxtyping import Float, Integer, Num
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm, Colormap, LinearSegmentedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

MAX_NUMBERED = 20
"""Heat maps with more columns show colours without numbers."""


@dataclasses.dataclass(frozen=True)
class Theme:
    """Colours of one set of figures.

    Attributes:
        name: "light" or "dark".
        ink: text.
        muted: axes, ticks and secondary text.
        grid: grid lines.
        surface: background.
        neutral: zero or the middle in heat maps; it stands out from the background a little.
        first: the first series (blue).
        second: the second series (orange).
    """

    name: str
    ink: str
    muted: str
    grid: str
    surface: str
    neutral: str
    first: str
    second: str

    def sequential(self) -> Colormap:
        """From neutral to blue: for values from zero upwards."""
        return LinearSegmentedColormap.from_list("sequential", [self.neutral, self.first])

    def diverging(self) -> Colormap:
        """From orange over neutral to blue: for values around a middle."""
        return LinearSegmentedColormap.from_list("diverging", [self.second, self.neutral, self.first])


LIGHT = Theme("light", "#1f2328", "#656d76", "#e6e8eb", "#ffffff", "#eff2f5", "#0969b3", "#d9660a")
DARK = Theme("dark", "#e6edf3", "#9aa4af", "#2b3139", "#161b22", "#262d37", "#4fa8ee", "#f0913a")


@contextmanager
def _style(theme: Theme) -> Iterator[None]:
    # Artists read these settings when they are made; the caller's own are back afterwards.
    settings = {
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": theme.ink,
        "figure.facecolor": theme.surface,
        "figure.constrained_layout.use": True,
        "axes.facecolor": theme.surface,
        "axes.edgecolor": theme.muted,
        "axes.labelcolor": theme.muted,
        "axes.titlecolor": theme.ink,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.linewidth": 0.8,
        "axes.axisbelow": "line",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "legend.frameon": False,
        "legend.labelcolor": theme.ink,
        "lines.linewidth": 1.8,
        "lines.solid_capstyle": "round",
    }
    with matplotlib.rc_context(settings):
        yield


def to_png(figure: Figure, *, dpi: int = 200) -> bytes:
    """Renders a figure as a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi, facecolor=figure.get_facecolor(), metadata={"Software": None})
    return file.getvalue()


def to_data_uri(png: bytes) -> str:
    """A PNG file as text that stands in an image's `src`."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def learning_curves(
    history: Sequence[Mapping], metric: str, theme: Theme, *, label: str, best_step: int | None = None
) -> Figure:
    """One metric of the training and validation data over the steps.

    Training records are drawn faintly and their means over each epoch clearly.

    Args:
        history: records of metrics.jsonl, with "step", "epoch" and "split".
        metric: name of the value to draw; records without it are left out.
        theme: colours.
        label: the metric's name for people.
        best_step: step of the best checkpoint, marked by a line.
    """
    with _style(theme):
        figure = Figure(figsize=(4.8, 3.3))
        axes = figure.add_subplot(xlabel="step", ylabel=label)
        axes.grid(axis="y")
        train = [r for r in history if r["split"] == "train" and metric in r]
        valid = [r for r in history if r["split"] == "valid" and metric in r]
        if train:
            steps, epochs, values = (np.array([r[key] for r in train]) for key in ("step", "epoch", metric))
            ends, means = zip(
                *((steps[epochs == e].max(), values[epochs == e].mean()) for e in np.unique(epochs)), strict=True
            )
            if len(ends) < len(steps):
                axes.plot(steps, values, color=theme.first, alpha=0.3, linewidth=0.9)
            axes.plot(ends, means, color=theme.first, label="training", marker=_marker(ends))
        if valid:
            steps, values = zip(*((r["step"], r[metric]) for r in valid), strict=True)
            axes.plot(steps, values, color=theme.second, label="validation", marker=_marker(steps))
        if best_step is not None:
            axes.axvline(best_step, color=theme.muted, linewidth=1, linestyle=(0, (4, 3)), zorder=1, label="best")
        axes.margins(x=0.02)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2, handlelength=1.6)
        return figure


def confusion_matrix(counts: Integer[np.ndarray, "K K"], names: Sequence[str], theme: Theme) -> Figure:
    """Counts of each true class (rows) predicted as each class (columns); the colour is the share of the row."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    with _style(theme):
        side = float(np.clip(1.7 + 0.48 * len(names), 3.2, 9.0))
        figure = Figure(figsize=(side + 0.7, side))
        axes = figure.add_subplot(xlabel="predicted", ylabel="true")
        image = _heat_map(axes, shares, theme.sequential(), Normalize(0, 1), theme, texts=np.char.mod("%d", counts))
        axes.set_xticks(range(len(names)), names, rotation=40, rotation_mode="anchor", ha="right")
        axes.set_yticks(range(len(names)), names)
        _color_bar(figure, image, axes, "share of the true class")
        return figure


def regression_scatter(
    predicted: Float[np.ndarray, "n K"], target: Float[np.ndarray, "n K"], names: Sequence[str], theme: Theme
) -> Figure:
    """Predictions against targets, with the line on which they agree; one panel a target."""
    n_columns = min(len(names), 3)
    n_rows = -(-len(names) // n_columns)
    side = 4.4 if len(names) == 1 else 2.6
    opacity = float(np.clip(15 / np.sqrt(len(target)), 0.15, 0.8))
    with _style(theme):
        figure = Figure(figsize=(n_columns * side + 0.4, n_rows * side + 0.2))
        panels = figure.subplots(n_rows, n_columns, squeeze=False)
        for axes in panels.flat[len(names) :]:
            axes.remove()
        for k, name in enumerate(names):
            axes = panels.flat[k]
            axes.set(xlabel="target", ylabel="prediction", title=name)
            axes.set_aspect("equal", adjustable="datalim")
            axes.grid()
            axes.axline((0, 0), slope=1, color=theme.muted, linewidth=1, linestyle=(0, (4, 3)))
            axes.scatter(target[:, k], predicted[:, k], s=20, color=theme.first, alpha=opacity, linewidths=0)
        return figure


def label_scores(scores: Float[np.ndarray, " K"], names: Sequence[str], theme: Theme, *, label: str) -> Figure:
    """One bar a label; a score that is NaN has no bar."""
    with _style(theme):
        figure = Figure(figsize=(4.8, 0.9 + 0.32 * len(names)))
        axes = figure.add_subplot(xlabel=label, xlim=(0, 1.08))
        bars = axes.barh(range(len(names)), np.nan_to_num(scores), color=theme.first, height=0.6)
        axes.bar_label(bars, ["" if np.isnan(s) else f"{s:.2f}" for s in scores], padding=4, color=theme.ink)
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        return figure


def coupling_gains(gains: Mapping[str, Float[np.ndarray, "M N"]], modalities: Sequence[str], theme: Theme) -> Figure:
    """The gain g of each modality and state, one panel a layer; 1 / M, an even share, has the neutral colour."""
    even = 1 / len(modalities)
    # At least 0.05, so that the noise of an untrained table is not blown up to full colours.
    spread = max(0.05, *(float(np.abs(g - even).max()) for g in gains.values()))
    with _style(theme):
        figure = Figure(figsize=(4.8, 0.7 + len(gains) * (0.55 + 0.3 * len(modalities))))
        panels = np.atleast_1d(figure.subplots(len(gains), sharex=True))
        for axes, (title, gain) in zip(panels, gains.items(), strict=True):
            texts = np.char.mod("%.2f", gain) if gain.shape[1] <= 8 else None
            norm = CenteredNorm(even, spread)
            image = _heat_map(axes, gain, theme.diverging(), norm, theme, texts=texts, aspect="auto")
            axes.set_yticks(range(len(modalities)), modalities)
            axes.set_title(title)
        panels[-1].set_xlabel("state")
        panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        _color_bar(figure, image, list(panels), "gain g")
        return figure


def coupling_matrices(
    matrices: Mapping[str, Float[np.ndarray, "M M"]],
    modalities: Sequence[str],
    theme: Theme,
    *,
    at_least: float = 0.0,
) -> Figure:
    """Weights from each modality (columns) to each modality (rows), one panel a layer; NaN leaves a cell empty.

    Args:
        matrices: per title of a panel, the weights.
        modalities: names, in the order of the axes.
        theme: colours.
        at_least: the strongest colour stands for this value or the largest weight, whichever is larger.
    """
    values = np.stack(list(matrices.values()))
    largest = max(at_least, float(np.nanmax(np.abs(values))))
    signed = bool(np.nanmin(values) < 0)
    norm = CenteredNorm(0, largest) if signed else Normalize(0, largest)
    colors = theme.diverging() if signed else theme.sequential()
    side = float(np.clip(0.5 * len(modalities), 1.3, 4.0))
    n_columns = min(len(matrices), max(1, int(4.5 / side)))
    n_rows = -(-len(matrices) // n_columns)
    with _style(theme):
        figure = Figure(figsize=(1.2 + n_columns * (side + 0.15), 1.0 + n_rows * (side + 0.3)))
        panels = figure.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False)
        for axes in panels.flat[len(matrices) :]:
            axes.remove()
        for axes, (title, matrix) in zip(panels.flat, matrices.items(), strict=False):
            _heat_map(axes, matrix, colors, norm, theme, texts=np.char.mod("%.2f", matrix))
            axes.set_xticks(range(len(modalities)), modalities, rotation=40, rotation_mode="anchor", ha="right")
            axes.set_yticks(range(len(modalities)), modalities)
            axes.set_title(title)
        figure.supxlabel("from", fontsize="medium", color=theme.muted)
        figure.supylabel("to", fontsize="medium", color=theme.muted)
        return figure


def over_time(
    panels: Mapping[str, tuple[Sequence[str], Float[np.ndarray, "rows L"]]], theme: Theme, *, time_label: str
) -> Figure:
    """Rows of colours over time, one panel below the other.

    Args:
        panels: per title the names of the rows and the values [rows, L]; each panel has colours of its own: from zero
            to its largest value, or around zero where some are negative.
        theme: colours.
        time_label: what a column is.
    """
    heights = [0.35 + 0.24 * len(names) for names, _ in panels.values()]
    with _style(theme):
        figure = Figure(figsize=(7.2, 0.6 + sum(heights) + 0.3 * len(heights)))
        rows = np.atleast_1d(figure.subplots(len(panels), height_ratios=heights))
        for axes, (title, (names, values)) in zip(rows, panels.items(), strict=True):
            largest = float(np.abs(values).max()) or 1.0
            signed = bool(values.min() < 0)
            norm = CenteredNorm(0, largest) if signed else Normalize(0, largest)
            colors = theme.diverging() if signed else theme.sequential()
            image = axes.imshow(values, cmap=colors, norm=norm, aspect="auto", interpolation="nearest")
            axes.set_yticks(range(len(names)), names)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
            axes.set_title(title)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            _color_bar(figure, image, axes, "")
        rows[-1].set_xlabel(time_label)
        return figure


def _heat_map(
    axes: Axes,
    values: Num[np.ndarray, "rows columns"],
    colors: Colormap,
    norm: Normalize,
    theme: Theme,
    *,
    texts: np.ndarray | None,
    aspect: Literal["auto", "equal"] = "equal",
) -> AxesImage:
    image = axes.imshow(values, cmap=colors, norm=norm, aspect=aspect, interpolation="nearest")
    axes.tick_params(which="both", length=0)
    axes.set_xticks(np.arange(values.shape[1] + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(values.shape[0] + 1) - 0.5, minor=True)
    axes.grid(which="minor", color=theme.surface, linewidth=min(1.0, 20 / values.shape[1]))
    axes.spines[:].set_visible(False)
    if texts is not None and texts.shape[1] <= MAX_NUMBERED:
        # Ink on pale cells, the surface's colour on strong ones: whichever differs more in lightness.
        inks = np.array([to_rgb(theme.ink), to_rgb(theme.surface)])
        for row, column in np.argwhere(np.isfinite(values)):
            cell = np.array(image.to_rgba(values[row, column])[:3])
            ink = inks[np.argmax(np.abs(inks.mean(axis=1) - cell.mean()))]
            axes.text(column, row, texts[row, column], ha="center", va="center", color=ink, fontsize="small")
    return image


def _color_bar(figure: Figure, image: AxesImage, axes: Axes | list[Axes], label: str) -> None:
    bar = figure.colorbar(image, ax=axes, label=label, shrink=0.9, aspect=25, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)


def _marker(points: Sequence) -> str:
    return "o" if len(points) == 1 else ""  # A line through one point would not show.
