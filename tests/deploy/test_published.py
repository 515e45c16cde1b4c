import builtins

import numpy as np
import published_oracle as oracle
import pytest
from safetensors.numpy import save_file
from scipy import special

from cmamba_jax import cli
from cmamba_jax.config import TaskConfig
from cmamba_jax.deploy import load_model, published
from cmamba_jax.errors import UserError

DIMS = {"audio": 5, "vision": 3, "text": 6}


@pytest.fixture(params=[1, 2], ids=["shared blocks", "blocks for each"])
def generation(request):
    return request.param


def inputs(rng, dims, n=3, length=7):
    return {m: rng.normal(size=(n, length, f)).astype(np.float32) for m, f in dims.items()}


def test_a_coupled_mamba_computes_what_the_published_network_computes(generation):
    rng = np.random.default_rng(generation)
    tensors, x = oracle.coupled_mamba(rng, generation=generation), inputs(rng, DIMS)
    run = published.convert(tensors)
    assert run.model.modalities == ("audio", "vision", "text") and run.config.model.coupling == "released"
    outputs = [p.outputs for p in run.predict(x)]
    np.testing.assert_allclose(outputs, oracle.run_coupled_mamba(tensors, x, generation), rtol=1e-4, atol=1e-5)


def test_mambas_compute_their_own_features():
    rng = np.random.default_rng(3)
    checkpoints = {name: oracle.mamba(rng) for name in ("text", "audio")}
    run = published.convert_mambas(checkpoints, task=TaskConfig("classification", 3))
    x = inputs(rng, dict.fromkeys(checkpoints, 6))
    pooled = [oracle.run_mamba(checkpoints[m], x[m].astype(np.float64)).max(1) for m in checkpoints]
    head = {name: np.asarray(value) for name, value in run.params["head"].items()}
    hidden = np.maximum(np.mean(pooled, 0) @ head["hidden"] + head["hidden_bias"], 0)  # Equal weights at the start.
    expected = special.softmax(hidden @ head["out"] + head["out_bias"], -1)
    np.testing.assert_allclose([p.outputs for p in run.predict(x)], expected, rtol=1e-4, atol=1e-6)


def test_a_converted_model_is_saved_like_any_other(tmp_path):
    rng = np.random.default_rng(4)
    save_file(oracle.coupled_mamba(rng), tmp_path / "weights.safetensors")
    run = published.convert(published.read(tmp_path / "weights.safetensors"))
    cli.main(["convert", str(tmp_path / "weights.safetensors"), str(tmp_path / "model")])
    loaded = load_model(tmp_path / "model")
    x = inputs(rng, DIMS)
    np.testing.assert_array_equal(*([p.outputs for p in r.predict(x)] for r in (run, loaded)))


def without(tensors, name):
    return {key: value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: {}, "is it a Coupled Mamba's"),
    (lambda t: without(t, "norm_f.bias"), "norm_f.bias is absent"),
    (lambda t: t | {"norm_f.weight": np.ones(9)}, r"norm_f.weight has shape \[9\], expected \[8\]"),
    (lambda t: t | {"norm_f.weight": np.ones((8, 1))}, r"expected 1 axes"),
    (lambda t: t | {"layers.0.mixer.in_proj.bias": np.ones(32)}, r"in_proj.bias \(1 in all\) have no counterpart"),
    (lambda t: t | {"weight_text_inner": -np.ones(1)}, "gives positive shares only"),
    (lambda t: t | {"layers.0.mixer.in_proj.weight": np.ones((30, 8))}, "expected 2 x expand x d_model"),
])  # fmt: skip
def test_checkpoints_of_other_networks(change, message):
    with pytest.raises(UserError, match=message):
        published.convert(change(oracle.coupled_mamba(np.random.default_rng(0), generation=1)))


def test_mambas_that_do_not_fit():
    rng = np.random.default_rng(0)
    good = oracle.mamba(rng)
    with pytest.raises(UserError, match="audio: layers.0.norm.bias is absent: RMSNorm"):
        published.convert_mambas({"text": good, "audio": without(good, "backbone.layers.0.norm.bias")})
    with pytest.raises(UserError, match="differ in size"):
        published.convert_mambas({"text": good, "audio": oracle.mamba(rng, n_layers=1)})
    with pytest.raises(UserError, match="is it a Mamba's"):
        published.convert_mambas({"text": {"backbone.norm_f.weight": np.ones(6)}})


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="does not exist"):
        published.read(tmp_path / "absent.pt")
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="cannot be read"):
        published.read(tmp_path / "bad.safetensors")
    real = builtins.__import__

    def no_torch(name, *args, **kwargs):
        if name == "torch":
            raise ImportError("No module named 'torch'", name="torch")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_torch)
    (tmp_path / "model.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"without torch: install it, or .* safetensors.torch.save_file"):
        published.read(tmp_path / "model.pt")
