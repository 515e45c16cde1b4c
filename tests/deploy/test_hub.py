import dataclasses
import pathlib

import huggingface_hub
import jax
import numpy as np
import pytest

from cmamba_jax.deploy import PretrainedModel, hub, pretrained

METRICS = {"valid": {"loss": 0.5, "accuracy": 0.75}, "test": {"loss": 0.25, "accuracy": 0.875, "auc": None}}


@pytest.fixture(scope="module")
def model(make_run):
    return PretrainedModel(dataclasses.replace(make_run(), metrics=METRICS))


def test_save_and_load(model, make_inputs, tmp_path):
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    loaded = PretrainedModel.from_pretrained(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, loaded.run.params, model.run.params)
    inputs = make_inputs(2, 4)
    np.testing.assert_array_equal(*([p.outputs for p in m.predict(inputs)] for m in (model, loaded)))


def test_the_card_holds_the_metrics_of_the_run(model, tmp_path):
    model.save_pretrained(tmp_path)
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "cmamba-jax" and "coupled-mamba" in card.data.tags
    measured = {(r.dataset_split, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert measured == {(s, n): v for s, values in METRICS.items() for n, v in values.items() if v is not None}
    assert "| test | 0.2500 | 0.8750 | undefined |" in card.text and "| audio | 2 |" in card.text
    assert "PretrainedModel.from_pretrained" in card.text and "a, b, c" in card.text


def test_a_card_without_metrics(make_run):
    text = str(PretrainedModel(make_run(kind="regression", n_outputs=1)).generate_model_card())
    assert "No results are recorded." in text and "model-index" not in text


def test_push_uploads_the_three_files(model, monkeypatch):
    calls = {}

    def create_repo(self, repo_id, **kwargs):
        calls["repo"] = repo_id
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, **kwargs):
        calls["files"] = {p.name: p.read_bytes() for p in pathlib.Path(folder_path).iterdir()}
        return "done"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    assert model.push_to_hub("me/fusion") == "done" and calls["repo"] == "me/fusion"
    assert set(calls["files"]) == {"README.md", "config.json", "model.safetensors"}
    assert b'from_pretrained("me/fusion")' in calls["files"]["README.md"]


def test_from_the_hub_only_the_two_files_are_read(model, tmp_path, monkeypatch):
    pretrained.save(model.run, tmp_path)
    calls = {}

    def snapshot_download(repo_id, **kwargs):
        calls.update(kwargs, repo_id=repo_id)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", lambda **kwargs: str(tmp_path / "config.json"))
    loaded = PretrainedModel.from_pretrained("me/fusion", revision="v1")
    jax.tree.map(np.testing.assert_array_equal, loaded.run.params, model.run.params)
    assert calls["repo_id"] == "me/fusion" and calls["revision"] == "v1"
    assert calls["allow_patterns"] == ["config.json", "model.safetensors"]
