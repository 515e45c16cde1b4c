"""The causal convolution on a GPU: JAX_PLATFORMS=cuda pytest tests/pallas_kernels/test_causal_conv_device.py"""

import jax
import jax.numpy as jnp
import pytest
import test_causal_conv as suite

from pallas_kernels import causal_conv
from pallas_kernels.causal_conv import causal_conv_silu, mosaic_gpu
from pallas_kernels.platform import default_platform

if causal_conv.unsupported(default_platform(), jnp.zeros((1, 1, 1, 1)), jnp.zeros((1, 2, 1))) is not None:
    pytest.skip("needs a Hopper GPU and JAX_PLATFORMS=cuda", allow_module_level=True)

MORE = [
    (3, 5, 700, 136, 4, "bfloat16", True),
    (3, 5, 700, 136, 4, "float32", True),
    (3, 17, 50, 256, 4, "bfloat16", False),
    (1, 7, 21, 64, 4, "bfloat16", True),
    (1, 7, 21, 64, 2, "float32", False),
    (2, 3, 333, 40, 8, "bfloat16", True),
    (1, 13, 4096, 640, 4, "bfloat16", False),  # two tiles a block backwards, as the next one
    (3, 171, 300, 256, 4, "bfloat16", True),
]


@pytest.mark.parametrize("case", [*suite.CASES, *MORE], ids=str)
def test_on_a_gpu(case):
    suite.check(lambda *arguments: causal_conv_silu(*arguments, implementation="mosaic_gpu"), *case)


def test_eight_tiles_a_block_backwards(monkeypatch):
    monkeypatch.setattr(mosaic_gpu.backward, "BLOCKS", 16)
    suite.check(
        lambda *arguments: causal_conv_silu(*arguments, implementation="mosaic_gpu"),
        *(3, 5, 700, 136, 4, "bfloat16", False),
    )


def test_same_bits_twice():
    x, dy = (jax.random.normal(jax.random.key(k), (3, 4, 700, 256), jnp.bfloat16) for k in range(2))
    arguments = x, jnp.ones((3, 4, 256)), jnp.zeros((3, 256)), jnp.zeros((3, 4, 3, 256), jnp.bfloat16)

    @jax.jit
    def run(*arguments):
        y, pull = jax.vjp(lambda *v: causal_conv_silu(*v, implementation="mosaic_gpu"), *arguments)
        return y, *pull(dy)

    assert all((a == b).all() for a, b in zip(run(*arguments), run(*arguments), strict=True))
