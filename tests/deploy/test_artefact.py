import json
import os
import subprocess
import sys

import jax
import jax.export
import numpy as np
import pytest
import tiny
from scipy import special

from cmamba_jax.deploy import artefact
from cmamba_jax.errors import UserError


@pytest.fixture(autouse=True)
def _symbolic_sizes():
    with tiny.symbolic_sizes():
        yield


FRESH = """
import pathlib, sys
import numpy as np
from jax import export

folder = pathlib.Path(sys.argv[1])
model = export.deserialize((folder / "model.stablehlo").read_bytes())
for size in (1, 5):
    arrays = np.load(folder / f"inputs{size}.npz")
    inputs = {name: arrays[name] for name in ("text", "audio")}
    masks = {name: arrays["mask." + name] for name in inputs}
    np.save(folder / f"logits{size}.npy", model.call(inputs, masks))
loaded = {name.split(".")[0] for name in sys.modules}
assert not loaded & {"cmamba_jax", "pallas_kernels", "flax"}, loaded
"""

MODELS = {"frames": {"frame": 2, "encoder": "conv"}, "per step": {"per": "step", "coupling": "full"}}


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_a_fresh_process_without_the_package_gives_the_same_bits(make_run, make_inputs, tmp_path, changes):
    run, length = make_run(**changes), 7
    artefact.save(run, tmp_path, length=length)
    cases = {}
    for size in (1, 5):
        inputs = make_inputs(size, length, seed=size)
        masks = {m: np.random.default_rng(size).uniform(size=(size, length)) < 0.8 for m in inputs}
        cases[size] = inputs, masks
        np.savez(tmp_path / f"inputs{size}.npz", **inputs, **{f"mask.{m}": mask for m, mask in masks.items()})
    # The other process has to compile as this one does, for the same bits.
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, "-c", FRESH, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    exported = jax.export.deserialize((tmp_path / "model.stablehlo").read_bytes())
    for size, (inputs, masks) in cases.items():
        logits = np.load(tmp_path / f"logits{size}.npy")
        np.testing.assert_array_equal(logits, exported.call(inputs, masks))
        np.testing.assert_array_equal(logits, jax.jit(artefact.predict_function(run))(inputs, masks))
        expected = [p.outputs for p in run.predict(inputs, masks=masks)]
        np.testing.assert_allclose(special.softmax(logits, -1), expected, rtol=1e-4, atol=1e-6)


def test_one_artefact_for_all_platforms_and_batch_sizes(make_run, tmp_path):
    artefact.save(make_run(), tmp_path, length=4)
    exported = jax.export.deserialize((tmp_path / "model.stablehlo").read_bytes())
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert {str(aval.shape[0]) for aval in exported.in_avals} == {"batch"}
    signature = json.loads((tmp_path / "signature.json").read_text())
    assert signature["inputs"]["text"] == {"shape": ["batch", 4, 3], "dtype": "float32"}
    assert signature["logits"] == {"shape": ["batch", 3]} and signature["label_names"] == ["a", "b", "c"]


def test_mistakes(make_run, tmp_path):
    for length, platforms in ((0, ["cpu"]), (3, ["gameboy"]), (3, [])):
        with pytest.raises(UserError, match="expected length >= 1"):
            artefact.save(make_run(), tmp_path, length=length, platforms=platforms)
    assert not list(tmp_path.iterdir())
