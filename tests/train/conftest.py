import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from cmamba_jax.batch import Batch
from cmamba_jax.config import TaskConfig


@dataclasses.dataclass
class Output:
    logits: jnp.ndarray


class TinyModel(nnx.Module):
    """A linear classifier with dropout over two modalities of width 2; stands in for CoupledMamba."""

    def __init__(self, n_outputs: int = 3, dropout: float = 0.0):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Linear(4, 5, rngs=rngs), nnx.Linear(5, n_outputs, rngs=rngs)])
        self.dropout = dropout

    def __call__(self, batch, *, train=False, rngs=None):
        x = jnp.concatenate([batch.inputs["a"], batch.inputs["b"]], -1).mean(1)
        if train and self.dropout:
            x = nnx.Dropout(self.dropout)(x, deterministic=False, rngs=rngs)
        return Output(self.layers[1](nnx.relu(self.layers[0](x))))


class ArrayIterator:
    """Batches drawn from a seed and a position; the position is the state."""

    def __init__(self, batch_size: int = 4, seed: int = 0):
        self._batch_size, self._seed, self._position = batch_size, seed, 0

    def __iter__(self):
        return self

    def __next__(self):
        self._position += 1
        return make_batch(self._batch_size, seed=[self._seed, self._position])

    def get_state(self):
        return {"position": self._position}

    def set_state(self, state):
        self._position = state["position"]


def make_batch(batch_size: int = 4, *, seed=0, length: int = 3) -> Batch:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, batch_size)
    inputs = {m: rng.normal(size=(batch_size, length, 2)).astype(np.float32) for m in "ab"}
    inputs["a"] += labels[:, None, None]
    return Batch(inputs=inputs, labels=labels.astype(np.int32), weight=np.ones(batch_size, np.float32))


@pytest.fixture(autouse=True)
def _quick_compilation():
    with tiny.quick_compilation():
        yield


@pytest.fixture
def tiny_model():
    return TinyModel


@pytest.fixture
def batch():
    return make_batch


@pytest.fixture
def array_iterator():
    return ArrayIterator


@pytest.fixture
def tiny_task():
    return TaskConfig(kind="classification", n_outputs=3)


@pytest.fixture(scope="session")
def tiny_experiment():
    return tiny.TINY


@pytest.fixture(scope="session")
def tiny_run():
    return tiny.run()
