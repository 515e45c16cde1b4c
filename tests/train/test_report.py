import base64
import dataclasses
import html.parser
import json
import math
import re

import numpy as np
import pytest

from cmamba_jax.config import ExperimentConfig, ModelConfig, TaskConfig, TrainConfig, WatchConfig
from cmamba_jax.data import DataInfo
from cmamba_jax.models import CouplingTable
from cmamba_jax.train.report import MAX_TARGETS, write_report

CONFIG = ExperimentConfig("demo", WatchConfig(), ModelConfig(d_model=48), train=TrainConfig(monitor="accuracy"))
CLASSIFICATION = DataInfo({"accelerometer": 3, "gyroscope": 3}, TaskConfig("classification", 2), ("walk", "run"))
HISTORY = [
    {"step": 4, "epoch": 1, "split": "train", "loss": 1.0},
    {"step": 4, "epoch": 1, "split": "valid", "loss": 0.9, "accuracy": 0.75},
    {"step": 8, "epoch": 2, "split": "train", "loss": 0.5},
    {"step": 8, "epoch": 2, "split": "valid", "loss": 0.8, "accuracy": 0.5},
]
GAIN = CouplingTable(0, "forward", "gain", np.array([[0.3, 0.5], [0.7, 0.5]]))


def write(folder, **changes):
    arguments = {
        "config": CONFIG,
        "info": CLASSIFICATION,
        "metrics": {"valid": {"loss": 0.9}, "test": {"loss": 0.4, "accuracy": 0.6667, "auc": math.nan}},
        "history": HISTORY,
        "logits": np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]),
        "labels": np.array([0, 1, 0]),
        "coupling_tables": [GAIN],
        "facts": {"Device": "cpu"},
    }
    return write_report(folder, **(arguments | changes))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return write(tmp_path_factory.mktemp("run"))


class Page(html.parser.HTMLParser):
    """Text, tags and attributes of a page; checks that the tags nest."""

    def __init__(self, text):
        super().__init__()
        self.text, self.attributes, self.open = "", [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data + " "


def test_report_folder_has_page_metrics_and_pictures(report):
    names = {"index.html", "metrics.json", "loss.png", "accuracy.png", "confusion_matrix.png", "coupling_gain.png"}
    assert {file.name for file in report.parent.iterdir()} == names
    assert json.loads((report.parent / "metrics.json").read_text())["test"] == {
        "loss": 0.4,
        "accuracy": 0.6667,
        "auc": None,
    }


def test_page_is_self_contained(report):
    text = report.read_text()
    sources = [value for _, name, value in Page(text).attributes if name in ("src", "srcset", "href")]
    assert len(sources) == 8  # Four pictures, each for light and dark pages.
    for source in sources:
        kind, data = source.split(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data, validate=True).startswith(b"\x89PNG")
    assert not re.search(r"https?://|url\(|@import|<script|<link", text)


def test_page_shows_metrics_captions_configuration_and_facts(report):
    text = " ".join(Page(report.read_text()).text.split())
    assert "Accuracy, test 66.7%" in text
    assert "AUC, test undefined" in text
    assert "epoch 1 (step 4), whose validation accuracy, 75.0%, is the best" in text
    assert "2 of 3 predictions lie on the diagonal" in text
    assert "\u201crun\u201d for \u201cwalk\u201d (1 of 2)" in text
    assert "strongest gain is 0.70 (gyroscope, state 0)" in text
    assert "d_model 48" in text
    assert "Device cpu" in text


def test_only_changed_values_are_bold(report):
    bold = re.findall(r'<tr class="changed"><th>(.*?)</th>', report.read_text())
    assert bold == ["d_model", "monitor"]


def test_strings_of_the_user_are_escaped(tmp_path):
    evil = '<img src=x onerror="alert(1)">&'
    info = DataInfo({evil: 3, "b": 1}, CLASSIFICATION.task, (evil, "ok"))
    config = dataclasses.replace(CONFIG, name=evil, data=WatchConfig(source=evil))
    text = write(tmp_path, config=config, info=info, facts={evil: evil}).read_text()
    assert evil not in text
    assert "onerror" not in {name for _, name, _ in Page(text).attributes}
    assert evil in Page(text).text


@pytest.mark.parametrize("n_targets", [1, MAX_TARGETS + 2])
def test_regression_report(tmp_path, n_targets):
    rng = np.random.default_rng(0)
    info = DataInfo({"a": 1, "b": 1}, TaskConfig("regression", n_targets))
    values = rng.normal(size=(5, n_targets))
    path = write(tmp_path, info=info, logits=values, labels=values, metrics={"test": {"mae": 0.12345}})
    assert (path.parent / "scatter.png").exists()
    text = Page(path.read_text()).text
    assert "0.1235" in text
    assert (f"first {MAX_TARGETS} of {n_targets} targets" in text) == (n_targets > MAX_TARGETS)


def test_multilabel_report(tmp_path):
    info = DataInfo({"a": 1, "b": 1}, TaskConfig("multilabel", 3), ("x", "y", "z"))
    labels = np.array([[1.0, 0, 0], [0, 1, 0]])
    path = write(tmp_path, info=info, logits=labels - 0.5, labels=labels, metrics={"test": {"micro_f1": 1.0}})
    assert (path.parent / "label_f1.png").exists()


@pytest.mark.parametrize(
    ("kind", "caption"),
    [("weights", "from gyroscope to accelerometer in layer 2, backward (0.40)"), ("layer", "Norm of the linear map")],
)
def test_coupling_tables_of_every_kind(tmp_path, kind, caption):
    tables = [
        CouplingTable(
            layer, direction, kind, np.array([[0.8, 0.2 * layer + 0.2 * (direction == "backward")], [0.1, 0.9]])
        )
        for layer in range(2)
        for direction in ("forward", "backward")
    ]
    path = write(tmp_path, coupling_tables=tables)
    assert (path.parent / f"coupling_{kind}.png").exists()
    assert caption in Page(path.read_text()).text


def test_report_without_history_coupling_or_finite_logits(tmp_path):
    path = write(tmp_path, history=[], coupling_tables=[], logits=np.full((3, 2), np.nan))
    assert list(path.parent.glob("*.png")) == []
    assert "Figures" not in Page(path.read_text()).text


def test_report_is_overwritten(tmp_path):
    # Without pictures, which cost most of the time.
    first = write(tmp_path, history=[], coupling_tables=[], logits=np.full((3, 2), np.nan)).read_text()
    path = write(tmp_path, history=[], coupling_tables=[], logits=np.full((3, 2), np.nan), facts={"Device": "another"})
    assert path.read_text() == first.replace("<td>cpu<", "<td>another<")
