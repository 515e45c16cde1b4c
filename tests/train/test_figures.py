import sys

import matplotlib
import numpy as np
import pytest

from cmamba_jax.train import figures
from cmamba_jax.train.figures import DARK, LIGHT

HISTORY = [
    {"step": step, "epoch": 1 + (step - 1) // 4, "split": "train", "loss": 8.0 / step} for step in range(1, 9)
] + [{"step": step, "epoch": step // 4, "split": "valid", "loss": 1.0, "accuracy": 0.5} for step in (4, 8)]


def texts(figure):
    """All texts of a figure that are shown."""
    return [t.get_text() for t in figure.findobj(matplotlib.text.Text) if t.get_visible() and t.get_text()]


def settings():
    # Reading "backend" through RcParams would choose one and import pyplot.
    return dict(dict.items(matplotlib.rcParams))


def draw_all(theme):
    table = np.array([[0.25, 0.75], [0.75, 0.25]])
    return [
        figures.learning_curves(HISTORY, "loss", theme, label="Loss", best_step=4),
        figures.confusion_matrix(np.array([[3, 1], [0, 0]]), ["a", "b"], theme),
        figures.regression_scatter(table, table, ["one", "two"], theme),
        figures.label_scores(np.array([0.5, np.nan]), ["a", "b"], theme, label="F1"),
        figures.coupling_gains({"layer 1": table, "layer 2": table}, ["a", "b"], theme),
        figures.coupling_matrices({"layer 1": table}, ["a", "b"], theme),
    ]


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: theme.name)
def test_figures_render_without_pyplot_or_global_changes(theme):
    pyplot_was_there = "matplotlib.pyplot" in sys.modules
    before = settings()
    for figure in draw_all(theme):
        assert figures.to_png(figure, dpi=40).startswith(b"\x89PNG")
    assert settings() == before
    assert ("matplotlib.pyplot" in sys.modules) == pyplot_was_there


def test_rendering_is_deterministic():
    first, second = (figures.to_png(draw_all(LIGHT)[0], dpi=40) for _ in range(2))
    assert first == second


def test_training_curve_is_the_mean_of_each_epoch():
    (axes,) = figures.learning_curves(HISTORY, "loss", LIGHT, label="Loss").axes
    faint, training, validation = axes.lines
    np.testing.assert_allclose(faint.get_ydata(), [8.0 / step for step in range(1, 9)])
    np.testing.assert_array_equal(training.get_xdata(), [4, 8])
    np.testing.assert_allclose(
        training.get_ydata(), [np.mean([8.0 / s for s in steps]) for steps in (range(1, 5), range(5, 9))]
    )
    np.testing.assert_array_equal(validation.get_ydata(), [1.0, 1.0])


def test_curve_of_a_metric_that_only_validation_has():
    (axes,) = figures.learning_curves(HISTORY, "accuracy", LIGHT, label="Accuracy").axes
    assert [line.get_label() for line in axes.lines] == ["validation"]


def test_confusion_matrix_shows_counts_and_shares_of_rows():
    counts = np.array([[3, 1], [0, 0]])
    figure = figures.confusion_matrix(counts, ["walk", "run"], LIGHT)
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), [[0.75, 0.25], [0, 0]])
    assert {"3", "1", "0", "walk", "run"} <= set(texts(figure))


def test_large_confusion_matrix_has_no_numbers():
    n = figures.MAX_NUMBERED + 1
    figure = figures.confusion_matrix(np.full((n, n), 77), [f"class {k}" for k in range(n)], LIGHT)
    assert "77" not in texts(figure)


def test_gain_of_an_even_share_is_neutral():
    figure = figures.coupling_gains({"layer 1": np.full((2, 16), 0.5)}, ["a", "b"], LIGHT)
    image = figure.axes[0].images[0]
    np.testing.assert_allclose(image.to_rgba(0.5)[:3], matplotlib.colors.to_rgb(LIGHT.neutral), atol=0.01)


def test_coupling_matrices_name_the_modalities_and_show_numbers():
    matrix = np.array([[np.nan, 0.25], [0.75, np.nan]])
    figure = figures.coupling_matrices({"layer 1": matrix, "layer 2": matrix}, ["text", "audio"], LIGHT)
    shown = texts(figure)
    assert {"text", "audio", "layer 1", "layer 2", "0.25", "0.75", "from", "to"} <= set(shown)
    assert "nan" not in shown


def test_negative_weights_get_the_second_colour():
    figure = figures.coupling_matrices({"layer 1": np.array([[1.0, -1.0], [0.0, 1.0]])}, ["a", "b"], LIGHT)
    image = figure.axes[0].images[0]
    np.testing.assert_allclose(image.to_rgba(-1.0)[:3], matplotlib.colors.to_rgb(LIGHT.second), atol=0.01)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: theme.name)
def test_numbers_are_readable_on_every_cell(theme):
    """The contrast of text and cell is at least 3 : 1 (WCAG's bound for graphics)."""
    values = np.linspace(0, 1, 12).reshape(3, 4)
    figure = figures.coupling_matrices({"layer": np.vstack([values, values[:1]])}, list("abcd"), theme)
    (axes,) = figure.axes
    for text in axes.texts:
        column, row = (round(position) for position in text.get_position())
        cell = axes.images[0].to_rgba(np.vstack([values, values[:1]])[row, column])[:3]
        low, high = sorted((luminance(cell), luminance(matplotlib.colors.to_rgb(text.get_color()))))
        assert (high + 0.05) / (low + 0.05) >= 3


def luminance(rgb):
    linear = np.where(np.array(rgb) <= 0.04045, np.array(rgb) / 12.92, ((np.array(rgb) + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]
