"""The causal convolution with SiLU: XLA's, and the GPU kernels interpreted and compiled for an H100.

On a GPU: test_causal_conv_device.py.
"""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cmamba_jax.bench import topology
from cmamba_jax.config import ModelConfig, TaskConfig
from cmamba_jax.models import CoupledMamba, functional, partition
from pallas_kernels import causal_conv
from pallas_kernels._compat import interpret_params
from pallas_kernels.causal_conv import causal_conv_silu, mosaic_gpu, xla
from pallas_kernels.coupled_scan.types import UnsupportedError


def oracle(x, kernel, bias, window, mask, dy):
    """y and the gradients of x, kernel, bias and window, step by step in float64."""
    width, length = window.shape[2], x.shape[2]
    present = np.ones(x.shape, bool) if mask is None else np.broadcast_to(mask[..., None], x.shape)
    extended = np.concatenate([window, np.where(present, x, 0)], axis=2)
    y, dextended, dkernel, dbias = np.zeros(x.shape), np.zeros(extended.shape), np.zeros(kernel.shape), 0
    for t in range(length):
        taps = extended[:, :, t : t + width + 1]
        v = bias[:, None] + np.sum(kernel[:, None] * taps, axis=2)
        s = 1 / (1 + np.exp(-v))
        y[:, :, t] = v * s
        g = dy[:, :, t] * s * (1 + v * (1 - s))
        dextended[:, :, t : t + width + 1] += g[:, :, None] * kernel[:, None]
        dkernel += np.sum(g[:, :, None] * taps, axis=1)
        dbias = dbias + np.sum(g, axis=1)
    return y, np.where(present, dextended[:, :, width:], 0), dkernel, dbias, dextended[:, :, :width]


def check(function, m, b, length, d, taps, dtype, masked):
    """`function(x, kernel, bias, window, mask)` against the oracle; masked steps hold NaN."""
    keys, dtype = jax.random.split(jax.random.key(length + d), 6), jnp.dtype(dtype)
    x, dy = (jax.random.normal(key, (m, b, length, d), dtype) for key in keys[:2])
    window = jax.random.normal(keys[2], (m, b, taps - 1, d), dtype)
    kernel, bias = jax.random.normal(keys[3], (m, taps, d)), jax.random.normal(keys[4], (m, d))
    mask = jax.random.bernoulli(keys[5], 0.7, (m, b, length)) if masked else None
    if masked:
        x = jnp.where(mask[..., None], x, jnp.nan)

    @jax.jit
    def run(x, kernel, bias, window, mask, dy):
        y, pull = jax.vjp(lambda *floats: function(*floats, mask), x, kernel, bias, window)
        return y, *pull(dy)

    found = run(x, kernel, bias, window, mask, dy)
    arguments = (None if v is None else np.asarray(v, v.dtype if v.dtype == bool else np.float64)
                 for v in (x, kernel, bias, window, mask, dy))  # fmt: skip
    expected = oracle(*arguments)
    assert [v.dtype for v in found] == [dtype, dtype, jnp.float32, jnp.float32, dtype]
    for name, value, want in zip(("y", "x", "kernel", "bias", "window"), found, expected, strict=True):
        # Roundings of single results, and of sums over all steps.
        tolerance = (2e-2 if dtype == jnp.bfloat16 else 1e-5) * np.abs(want).max()
        np.testing.assert_allclose(np.asarray(value, np.float64), want, atol=tolerance, rtol=0, err_msg=name)


def interpreted(*arguments):
    return mosaic_gpu.conv_silu(interpret_params(), *arguments)


# M, B, L, D, K, dtype, masked.
CASES = [
    (1, 1, 5, 8, 2, "float32", True),
    (2, 1, 1, 72, 4, "bfloat16", False),
    (2, 2, 130, 72, 4, "bfloat16", True),
    (1, 1, 130, 72, 3, "float32", True),
    (1, 2, 70, 64, 4, "float32", False),
]
needs_ragged_copies = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the interpreter of JAX 0.10 drops copies that reach beyond an array"
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_xla(case):
    check(lambda *arguments: causal_conv_silu(*arguments, implementation="xla"), *case)


@needs_ragged_copies
@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted_kernels(case):
    check(interpreted, *case)


@needs_ragged_copies
def test_several_tiles_a_block(monkeypatch):
    """Tiles of several samples, and a last block with fewer of them."""
    monkeypatch.setattr(mosaic_gpu.backward, "BLOCKS", 2)
    check(interpreted, 1, 3, 130, 8, 4, "float32", True)


@needs_ragged_copies
@pytest.mark.parametrize("shared", [True, False])
def test_a_batch_of_problems(shared):
    """As several seeds in one program make them: of one kernel or of each its own."""
    x, kernel, bias, window = (jax.random.normal(jax.random.key(k), (2, *v.shape)) for k, v in enumerate(inputs()))
    axes = (0, None, None, 0) if shared else (0, 0, 0, 0)
    arguments = (x, kernel[0], bias[0], window) if shared else (x, kernel, bias, window)

    def gradients(function, *floats):
        y, pull = jax.vjp(lambda *floats: function(*floats, None), *floats)
        return y, *pull(jnp.ones_like(y))

    found = jax.vmap(lambda *floats: gradients(interpreted, *floats), axes)(*arguments)
    expected = jax.vmap(lambda *floats: gradients(xla.conv_silu, *floats), axes)(*arguments)
    for value, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(value, want, atol=1e-5)


def test_interpreted_forward_kernel_of_whole_tiles():
    """In every version of JAX."""
    x, window = (jax.random.normal(jax.random.key(n), (2, 1, n, 128)) for n in (128, 3))
    arguments = x, jnp.full((2, 4, 128), 0.3), jnp.ones((2, 128)), window, jnp.arange(256).reshape(2, 1, 128) % 3 > 0
    expected = causal_conv_silu(*arguments, implementation="xla")
    np.testing.assert_allclose(jax.jit(interpreted)(*arguments), expected, atol=1e-5)


COMPILED = [
    (3, 16, 2048, 1024, 4, "bfloat16", False),
    (3, 16, 2048, 1024, 4, "float32", True),
    (1, 3, 5, 64, 8, "float32", True),
    (2, 3, 130, 72, 2, "bfloat16", True),
]


def compile_case(device, m, b, length, d, taps, dtype, masked):
    """Facts about the compiled forward and backward pass."""

    def array(*shape, dtype="float32"):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.SingleDeviceSharding(device))

    x = array(m, b, length, d, dtype=dtype)
    floats = x, array(m, taps, d), array(m, d), array(m, b, taps - 1, d, dtype=dtype)
    mask = array(m, b, length, dtype=bool) if masked else None

    def forward_backward(floats, mask, dy):
        y, pull = jax.vjp(lambda *floats: mosaic_gpu.conv_silu(None, *floats, mask), *floats)
        return y, pull(dy)

    compiled = jax.jit(forward_backward).trace(floats, mask, x).lower(lowering_platforms=("cuda",)).compile()
    return {
        "x_bytes": x.size * jnp.dtype(dtype).itemsize,
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "kernels": compiled.as_text().count('custom_call_target="mosaic_gpu'),
    }


def compile_all():
    """Prints a JSON record for each of COMPILED, compiled for an H100 that is not there."""
    import compile_gpu
    from jax.experimental import topologies

    (device,) = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=compile_gpu.H100).devices
    with jax.default_device(device):
        for case in COMPILED:
            try:
                record = {"error": None} | compile_case(device, *case)
            except Exception as error:  # whatever the compiler raises is the result
                record = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(record), flush=True)


@pytest.fixture(scope="module")
def compiled():
    """The records, from a process of its own, since JAX's GPU plugin is otherwise kept away from the tests."""
    if not topology.gpu_available():
        pytest.skip(topology.GPU_MISSING)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "JAX_PLATFORMS": "cpu"}
    process = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    return [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("index", range(len(COMPILED)), ids=map(str, COMPILED))
def test_forward_and_backward_compile_for_an_h100(compiled, index):
    record = compiled[index]
    assert record["error"] is None and record["kernels"] == 2
    if COMPILED[index][2] > 1000:
        assert record["temp_bytes"] <= 0.1 * record["x_bytes"]


def inputs(taps=4, length=16, dtype="float32"):
    return (
        jnp.ones((1, 1, length, 8), dtype),
        jnp.ones((1, taps, 8)),
        jnp.zeros((1, 8)),
        jnp.zeros((1, 1, taps - 1, 8), dtype),
    )


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (inputs(taps=9), "takes 2 to 8 taps, got 9"),
        (inputs(taps=1), "takes 2 to 8 taps, got 1"),
        (inputs(dtype="float16"), "takes float32 and bfloat16, got float16"),
        (inputs(length=0), "takes no empty axes"),
    ],
)
def test_says_what_the_kernels_cannot_do(arguments, reason, monkeypatch):
    monkeypatch.setattr(causal_conv, "too_old_gpu", lambda *least: None)
    assert reason in causal_conv.unsupported("gpu", *arguments)


def test_without_a_gpu():
    with pytest.raises(UnsupportedError, match="needs an NVIDIA GPU, the default device is a"):
        causal_conv_silu(*inputs(), implementation="mosaic_gpu")
    with pytest.raises(UnsupportedError, match="unknown convolution implementation 'triton'; known: xla, mosaic_gpu"):
        causal_conv_silu(*inputs(), implementation="triton")
    assert causal_conv.choose_implementation(*inputs()) == "xla"


def test_chosen_on_a_gpu_where_it_can_be(monkeypatch):
    monkeypatch.setattr(causal_conv, "default_platform", lambda: "gpu")
    monkeypatch.setattr(causal_conv, "too_old_gpu", lambda *least: None)
    assert causal_conv.choose_implementation(*inputs()) == "mosaic_gpu"
    assert causal_conv.choose_implementation(*inputs(length=15)) == "xla"
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",))
    names = []

    def local(x):
        names.append(causal_conv.choose_implementation(x, *inputs()[1:]))
        return x

    spec = jax.sharding.PartitionSpec("data")
    jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec)(inputs()[0])
    assert names == ["xla"]
    monkeypatch.setattr(causal_conv, "too_old_gpu", lambda *least: "it needs a Hopper GPU")
    assert causal_conv.choose_implementation(*inputs()) == "xla"


@needs_ragged_copies
def test_the_model_takes_the_kernels_where_they_can_be_used(monkeypatch):
    """As if there were a GPU; with resets, in reverse or where XLA is asked for, it does not."""
    calls = []

    def kernels(*arguments, implementation):
        calls.append(implementation)
        return interpreted(*arguments)

    monkeypatch.setattr(causal_conv, "choose_implementation", lambda *arguments: "mosaic_gpu")
    monkeypatch.setattr(causal_conv, "causal_conv_silu", kernels)
    keys = jax.random.split(jax.random.key(0), 3)
    x, window = jax.random.normal(keys[0], (2, 1, 20, 8)), jax.random.normal(keys[1], (2, 1, 3, 8))
    mask = jax.random.bernoulli(keys[2], 0.7, (2, 1, 20))
    arguments = x, mask, jnp.full((2, 4, 8), 0.3), jnp.ones((2, 8)), window
    found = functional.causal_conv_silu(*arguments, None)
    assert calls == ["mosaic_gpu"]
    expected = functional.causal_conv_silu(*arguments, None, implementation="xla")
    for value, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(value, want, atol=1e-5)
    functional.causal_conv_silu(*arguments, jnp.zeros((1, 20), bool))
    functional.causal_conv_silu(*arguments, None, reverse=True)
    with partition.use(partition.Partition(jax.sharding.Mesh(jax.devices()[:1], ("data",)))):
        functional.causal_conv_silu(*arguments, None)
    assert calls == ["mosaic_gpu"]


@pytest.mark.parametrize(("scan", "implementation"), [(None, None), ("mosaic_gpu", None), ("xla", "xla")])
def test_the_scan_decides_for_the_convolution(scan, implementation, monkeypatch):
    asked = []

    def conv(*arguments, **options):
        asked.append(options["implementation"])
        raise InterruptedError

    monkeypatch.setattr(functional, "causal_conv_silu", conv)
    model = CoupledMamba(
        ModelConfig(d_model=8, n_layers=1, scan=scan),
        features={"a": 3, "b": 2},
        task=TaskConfig(kind="regression"),
        rngs=nnx.Rngs(0),
    )
    with pytest.raises(InterruptedError):
        model({"a": jnp.ones((1, 20, 3)), "b": jnp.ones((1, 20, 2))})
    assert asked == [implementation]


if __name__ == "__main__":
    compile_all()
