"""Compiles a sharded train step of the whole model for a TPU topology: `python compile_train_step.py v5e:2x2`.

A process of its own, as libtpu reads its settings at import. Prints the compiled program.
"""

import sys

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from cmamba_jax.config import ModelConfig, TaskConfig
from cmamba_jax.models import CoupledMamba
from cmamba_jax.train.state import split_model

SAMPLES, LENGTH = 8, 64  # a device
FEATURES = {"text": 32, "audio": 16, "vision": 8}


def main(topology: str) -> None:
    devices = topologies.get_topology_desc(topology, "tpu").devices
    mesh = jax.sharding.Mesh(devices, ("data",))
    with jax.default_device(jax.devices("cpu")[0]):
        config = ModelConfig(d_model=128, n_layers=2)
        graphdef, params = split_model(
            CoupledMamba(config, features=FEATURES, task=TaskConfig(kind="regression"), rngs=nnx.Rngs(0))
        )
        optimizer = optax.adam(1e-3)
        opt_state = optimizer.init(params)

    def loss(params, inputs, labels):
        logits = nnx.merge(graphdef, params)(inputs, train=True, rngs=nnx.Rngs(dropout=0)).logits
        return jax.lax.pmean(jnp.mean(jnp.abs(logits[:, 0] - labels)), "data")

    sharded_loss = jax.shard_map(
        loss,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("data"), PartitionSpec("data")),
        out_specs=PartitionSpec(),
    )

    def step(params, opt_state, inputs, labels):
        value, grads = jax.value_and_grad(sharded_loss)(params, inputs, labels)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    def abstract(tree, spec):
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=sharding), tree)

    batch = SAMPLES * len(devices)
    inputs = {m: jax.ShapeDtypeStruct((batch, LENGTH, f), jnp.float32) for m, f in FEATURES.items()}
    labels = jax.ShapeDtypeStruct((batch,), jnp.float32)
    with jax.default_device(devices[0]):
        compiled = (
            jax.jit(step)
            .lower(
                abstract(params, PartitionSpec()),
                abstract(opt_state, PartitionSpec()),
                abstract(inputs, PartitionSpec("data")),
                abstract(labels, PartitionSpec("data")),
            )
            .compile()
        )
    print(compiled.as_text())


if __name__ == "__main__":
    main(sys.argv[1])
