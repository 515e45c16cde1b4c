import dataclasses
import json

import jax
import numpy as np
import pytest

from cmamba_jax.config import WatchConfig
from cmamba_jax.deploy import load_model, pretrained
from cmamba_jax.errors import UserError
from cmamba_jax.train import state

MODELS = {
    "shared": {},
    "released, bidirectional": {"coupling": "released", "direction": "bidirectional", "fusion": "concat"},
    "full, per step": {"coupling": "full", "per": "step", "kind": "regression"},
}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def run(make_run, request):
    return make_run(**request.param)


def same(a, b):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


def test_parameters_come_back_to_the_bit(run, make_inputs, tmp_path):
    loaded = pretrained.load(pretrained.save(run, tmp_path / "model"))
    jax.tree.map(same, loaded.params, run.params)
    assert (loaded.config, loaded.info, loaded.epoch) == (run.config, run.info, run.epoch)
    inputs = make_inputs(3, 5)
    for a, b in zip(loaded.predict(inputs), run.predict(inputs), strict=True):
        np.testing.assert_array_equal(a.outputs, b.outputs)


def test_bfloat16(make_run, make_inputs, tmp_path):
    run = make_run()
    stored = pretrained.load(pretrained.save(run, tmp_path / "a", dtype="bfloat16"))
    jax.tree.map(same, stored.params, jax.tree.map(lambda x: x.astype("bfloat16"), run.params))
    again = pretrained.load(pretrained.save(stored, tmp_path / "b"))
    jax.tree.map(same, again.params, stored.params)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in "ab"]
    saved = pretrained.save(run, tmp_path / "c") / "model.safetensors"
    halved = sum(x.nbytes for x in jax.tree.leaves(run.params)) // 2
    assert sizes[0] == sizes[1] and abs(saved.stat().st_size - sizes[0] - halved) < 100
    outputs = [[p.outputs for p in r.predict(make_inputs(3, 5))] for r in (again, run)]
    np.testing.assert_allclose(*outputs, atol=0.02)


def test_parameters_have_readable_names(make_run, tmp_path):
    from safetensors.numpy import load_file

    run = make_run()
    tensors = load_file(pretrained.save(run, tmp_path) / "model.safetensors")
    assert sorted(tensors) == sorted(state.parameter_names(run.params))
    assert tensors["blocks.0.in_proj"].shape == (2, 4, 16)


def test_a_run_folder_and_its_export_are_the_same_model(tmp_path, make_inputs):
    import tiny

    run_dir = tiny.run().run_dir
    run = load_model(run_dir)
    exported = load_model(pretrained.save(run, tmp_path / "model"))
    jax.tree.map(same, exported.params, run.params)
    assert exported.metrics == json.loads((run_dir / "report/metrics.json").read_text())
    assert exported.evaluate("test").metrics == run.evaluate("test").metrics
    again = load_model(pretrained.save(exported, tmp_path / "again"))
    assert again.metrics == exported.metrics
    text = (tmp_path / "model/config.json").read_text()
    assert str(run_dir.parents[2]) not in text and json.loads(text)["experiment"]["name"] == "tiny"


def test_no_folder_of_this_machine_is_shared(make_run, tmp_path):
    run = make_run()
    config = dataclasses.replace(run.config, data=WatchConfig(source="/home/me/secret/watch.npy"))
    pretrained.save(dataclasses.replace(run, config=config), tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert "secret" not in text and '"watch.npy"' in text


def test_wrong_folders(make_run, tmp_path):
    folder = pretrained.save(make_run(), tmp_path / "model")
    weights, config = (folder / name for name in ("model.safetensors", "config.json"))
    good = weights.read_bytes()
    other = pretrained.save(make_run(d_state=3), tmp_path / "other")
    weights.write_bytes((other / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"parameter blocks.0.forward_ssm.A_log is \(2, 8, 3\), expected \(2, 8, 2\)"):
        pretrained.load(folder)
    weights.write_bytes(good[:200])
    with pytest.raises(UserError, match=r"model.safetensors cannot be read"):
        pretrained.load(folder)
    weights.unlink()
    with pytest.raises(UserError, match="does not exist; export the run again"):
        pretrained.load(folder)
    config.write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="is none of an exported model"):
        pretrained.load(folder)
    config.write_text('{"model_type": "coupled-mamba", "format": 99, "cmamba_jax": "9.0"}')
    with pytest.raises(UserError, match=r"has format 99, expected 1; use the cmamba_jax that wrote it, 9.0"):
        pretrained.load(folder)
    with pytest.raises(UserError, match="expected the folder of a run"):
        load_model(tmp_path)
