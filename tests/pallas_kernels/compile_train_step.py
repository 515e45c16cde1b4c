"""Compiles the train step of the whole model for a mesh: `python compile_train_step.py tpu v5e:2x2 data=2,sequence=2`.

A process of its own, as libtpu reads its settings at import. Prints the compiled program and, at the end, the bytes
that a device holds. A fourth word changes `SIZES`: `length=65536,n_layers=1`.
"""

import sys

import jax
import numpy as np
from flax import nnx

from cmamba_jax.batch import Batch
from cmamba_jax.bench import topology
from cmamba_jax.config import ModelConfig, OptimizerConfig, TaskConfig, TrainConfig
from cmamba_jax.models import CoupledMamba
from cmamba_jax.train import parallel
from cmamba_jax.train.objective import make_loss_sum
from cmamba_jax.train.optimizer import make_optimizer, make_schedule
from cmamba_jax.train.state import init_state, make_train_step, split_model

SIZES = {"samples": 8, "length": 64, "n_layers": 2, "scan": None}
"""Samples of a device, steps of a device, layers, and the implementation of the scan."""
FEATURES = {"text": 32, "audio": 16, "vision": 8}
TASK = TaskConfig(kind="regression")


def pairs(text: str) -> list[list[str]]:
    return [pair.split("=") for pair in text.split(",") if pair]


def main(platform: str, name: str, layout: str, changes: str = "") -> None:
    sizes = dict.fromkeys(parallel.AXES, 1) | {k: int(v) for k, v in pairs(layout)}
    chosen = SIZES | {k: v if k == "scan" else int(v) for k, v in pairs(changes)}
    devices = topology.devices(platform, name)
    strategy = parallel.MeshStrategy(
        jax.sharding.Mesh(np.array(devices).reshape([sizes[axis] for axis in parallel.AXES]), parallel.AXES)
    )
    optimizer = make_optimizer(OptimizerConfig(), make_schedule(OptimizerConfig(), steps_per_epoch=10, epochs=1))
    with jax.default_device(jax.devices("cpu")[0]):
        model = ModelConfig(d_model=128, n_layers=chosen["n_layers"], scan=chosen["scan"])
        graphdef, params = split_model(CoupledMamba(model, features=FEATURES, task=TASK, rngs=nnx.Rngs(0)))
        state = init_state(params, optimizer, seed=0)
    batch, length = chosen["samples"] * sizes["data"] * sizes["fsdp"], chosen["length"] * sizes["sequence"]
    inputs = Batch(
        inputs={m: jax.ShapeDtypeStruct((batch, length, f), np.float32) for m, f in FEATURES.items()},
        mask={m: np.ones((batch, length), bool) for m in FEATURES},
        labels=np.zeros((batch, 1), np.float32),
        weight=np.ones(batch, np.float32),
    )

    def abstract(tree, shardings):
        return jax.tree.map(lambda v, s: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=s), tree, shardings)

    with jax.default_device(devices[0]):
        compiled = (
            make_train_step(graphdef, optimizer, make_loss_sum(TASK, TrainConfig()), strategy)
            .trace(abstract(state, strategy.shardings(state)), abstract(inputs, strategy.batch_shardings(inputs)))
            .lower(lowering_platforms=(platform,))
            .compile()
        )
    print(compiled.as_text())
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    print("bytes", held - memory.alias_size_in_bytes)


if __name__ == "__main__":
    main(*sys.argv[1:])
