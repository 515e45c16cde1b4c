import jax
import jax.extend
import jax.numpy as jnp
import pytest
from flax import nnx

from cmamba_jax.config import ModelConfig, TaskConfig
from cmamba_jax.models import CoupledMamba
from cmamba_jax.models.flops import forward_flops

FEATURES = {"text": 7, "audio": 3, "vision": 5}
LENGTH = 6
SMALL = {"d_model": 8, "d_state": 4, "n_layers": 3, "d_conv": 4, "head_hidden": 6, "scan": "reference"}


def matmul_flops(jaxpr) -> int:
    """Operations of the matrix products outside of loops (the scan is a loop)."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            size = eqn.outvars[0].aval.size
            for axis in contracted:
                size *= eqn.invars[0].aval.shape[axis]
            total += 2 * size
        elif eqn.primitive.name not in ("scan", "while"):
            for value in eqn.params.values():
                if hasattr(value, "jaxpr"):
                    total += matmul_flops(value.jaxpr)
                elif hasattr(value, "eqns"):
                    total += matmul_flops(value)
    return total


@pytest.mark.parametrize("changes", [
    {},
    {"encoder": "conv", "encoder_width": 3},
    {"encoder": "mlp", "block_norm": "both"},
    {"coupling": "released"},
    {"direction": "bidirectional"},
    {"fusion": "concat"},
    {"fusion": "late", "dt_rank": 5},
    {"coupling": "cross_attention", "n_heads": 2},
    {"early_fusion": "concat", "fusion": "late"},
    {"early_fusion": "average", "fusion": "concat"},
    {"n_layers": 0},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("per", ["sequence", "step"])
def test_matrix_products_are_those_of_the_traced_model(changes, per):
    check_products(changes, per)


def test_matrix_products_with_frames():
    check_products({"frame": 4, "encoder": "conv"}, "sequence")


def check_products(changes, per):
    config, task = ModelConfig(**SMALL | changes), TaskConfig(n_outputs=2, per=per)

    def forward(inputs):
        return CoupledMamba(config, features=FEATURES, task=task, rngs=nnx.Rngs(0))(inputs).logits

    inputs = {name: jnp.ones((1, LENGTH, width)) for name, width in FEATURES.items()}
    flops = forward_flops(config, FEATURES, task, LENGTH)
    products = sum(flops[part] for part in flops if part not in ("scan", "convolution"))
    assert products == matmul_flops(jax.make_jaxpr(forward)(inputs).jaxpr)


def test_scan_and_convolution():
    def flops(**changes):
        return forward_flops(ModelConfig(**SMALL | changes), FEATURES, TaskConfig(), LENGTH)

    steps, d, n = 3 * LENGTH * 3, 16, 4
    assert flops(coupling="independent")["scan"] == 6 * steps * d * n
    assert flops(coupling="released")["scan"] == 6 * steps * d * n
    assert flops(coupling="shared")["scan"] == 7 * steps * d * n
    assert flops(coupling="full")["scan"] == 12 * steps * d * n
    assert flops()["convolution"] == 2 * steps * 4 * d
    for part in ("scan", "convolution"):
        assert flops(direction="bidirectional")[part] == 2 * flops()[part]
