"""Compiles the train step of the whole model for a mesh: `python compile_train_step.py tpu v5e:2x2 data=2,sequence=2`.

A process of its own, as libtpu reads its settings at import. Prints the compiled program.
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

SAMPLES, LENGTH = 8, 64  # a device
FEATURES = {"text": 32, "audio": 16, "vision": 8}
TASK = TaskConfig(kind="regression")


def main(platform: str, name: str, layout: str) -> None:
    sizes = dict.fromkeys(parallel.AXES, 1) | {k: int(v) for k, v in (pair.split("=") for pair in layout.split(","))}
    devices = topology.devices(platform, name)
    strategy = parallel.MeshStrategy(
        jax.sharding.Mesh(np.array(devices).reshape([sizes[axis] for axis in parallel.AXES]), parallel.AXES)
    )
    optimizer = make_optimizer(OptimizerConfig(), make_schedule(OptimizerConfig(), steps_per_epoch=10, epochs=1))
    with jax.default_device(jax.devices("cpu")[0]):
        graphdef, params = split_model(
            CoupledMamba(ModelConfig(d_model=128, n_layers=2), features=FEATURES, task=TASK, rngs=nnx.Rngs(0))
        )
        state = init_state(params, optimizer, seed=0)
    batch, length = SAMPLES * sizes["data"] * sizes["fsdp"], LENGTH * sizes["sequence"]
    inputs = Batch(
        inputs={m: np.zeros((batch, length, f), np.float32) for m, f in FEATURES.items()},
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


if __name__ == "__main__":
    main(*sys.argv[1:])
