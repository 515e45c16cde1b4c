# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/cmamba_jax/blob/main/notebooks/d_many_devices.ipynb)
#
# # Many devices
#
# A mesh of devices, simulated on the CPU here: a batch spread over it, and one long sequence cut into pieces that are
# scanned at the same time. The same code runs on GPUs and TPUs.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("cmamba_jax") is None:  # On Colab; nothing to do where the package is installed.
    source = "cmamba-jax[data] @ git+https://github.com/OWNER/cmamba_jax"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", source], check=True)

from cmamba_jax.versions import check_versions

check_versions()  # Says what to do where a preinstalled JAX or Flax is too old.

# %%
import os

# Eight simulated devices where there is one CPU; has to be set before JAX starts.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax

if jax.default_backend() == "cpu":
    assert jax.device_count() == 8, "JAX was started before this cell: restart the session and run all cells"
from cmamba_jax.versions import describe_environment

print(describe_environment())

# %% [markdown]
# ## A mesh, and how arrays lie on it

# %%
import os

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cmamba_jax import Batch, CoupledMamba, ModelConfig, TaskConfig

REDUCED = bool(os.environ.get("CMAMBA_NOTEBOOK_REDUCED"))  # In our tests: smaller arrays.
mesh = Mesh(np.array(jax.devices()).reshape(4, -1), ("data", "sequence"))
print(mesh)
example = jax.device_put(np.zeros((8, 16), np.float32), NamedSharding(mesh, PartitionSpec("data", "sequence")))
jax.debug.visualize_array_sharding(example, use_color=False)  # [B, L]: rows are samples, columns are time

# %% [markdown]
# ## Data parallel
# Parameters are copied to every device, the batch is cut along B, and `jax.jit` finds out what has to be exchanged:
# one sum of the gradients. Loss and gradients are those of one device.

# %%
model = CoupledMamba(
    ModelConfig(d_model=16, d_state=8, n_layers=1),
    features={"text": 12, "audio": 5},
    task=TaskConfig("classification", 3),
    rngs=nnx.Rngs(0),
)
graphdef, params = nnx.split(model, nnx.Param)
rng = np.random.default_rng(0)
size, length = 16, 16 if REDUCED else 64
batch = Batch(
    inputs={"text": rng.normal(size=(size, length, 12)).astype(np.float32)}
    | {"audio": rng.normal(size=(size, length, 5)).astype(np.float32)},
    labels=rng.integers(0, 3, size),
)


@jax.jit
def loss_and_gradients(params, batch):
    def loss(params):
        logits = nnx.merge(graphdef, params)(batch).logits
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch.labels[:, None], 1).mean()

    return jax.value_and_grad(loss)(params)


one = loss_and_gradients(params, batch)
spread = jax.device_put(batch, NamedSharding(mesh, PartitionSpec(("data", "sequence"))))
copied = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
many = loss_and_gradients(copied, spread)
difference = jax.tree.map(lambda a, b: float(jnp.abs(np.asarray(a) - np.asarray(b)).max()), one, many)
print("devices of a batch:", len(spread.inputs["text"].devices()))
print("largest difference to one device:", max(jax.tree.leaves(difference)))
compiled = loss_and_gradients.lower(copied, spread).compile().as_text()
print("sums over devices in the compiled step:", compiled.count(" all-reduce("))

# %% [markdown]
# ## One sequence over many devices
# What a piece of the sequence does to the state is affine: `after = P * before + e`, with P the product of the decays
# and e the end state from zero. Because the coupling needs one chain only, both have the shape [B, D, N], however
# long the sequence is and however many modalities there are. So:
#
# 1. every device finds P and e of its own piece;
# 2. they tell each other these two arrays;
# 3. every device knows the state that enters its piece, and scans it.

# %%
from pallas_kernels import Shared, coupled_scan

M, B, L, D, N = 2, 2, 64 if REDUCED else 1024, 8, 4
keys = jax.random.split(jax.random.key(0), 6)
arrays = {
    "x": jax.random.normal(keys[0], (M, B, L, D)),
    "dt": jax.random.normal(keys[1], (M, B, L, D)) - 4,
    "B": jax.random.normal(keys[2], (M, B, L, N)),
    "C": jax.random.normal(keys[3], (M, B, L, N)),
}
A = -jnp.exp(jax.random.normal(keys[4], (M, D, N)))
coupling = Shared(jax.nn.log_softmax(jax.random.normal(keys[5], (M, N)), axis=0))
line = Mesh(np.array(jax.devices()), ("sequence",))
cut = PartitionSpec(None, None, "sequence")


def scan(arrays, before):
    return coupled_scan(**arrays, A=A, coupling=coupling, initial_state=before, implementation="reference")


def piece(arrays):
    zero = jax.lax.pcast(jnp.zeros((B, D, N)), "sequence", to="varying")
    e = scan(arrays, zero).final_state
    P = scan(arrays, zero + 1).final_state - e  # the map is affine
    all_P, all_e = (jax.lax.all_gather(v, "sequence") for v in (P, e))
    before = zero
    for device in range(8):
        earlier = device < jax.lax.axis_index("sequence")
        before = jnp.where(earlier, all_P[device] * before + all_e[device], before)
    return scan(arrays, before).y


y = jax.jit(jax.shard_map(piece, mesh=line, in_specs=cut, out_specs=cut))(arrays)
whole = coupled_scan(**arrays, A=A, coupling=coupling).y
print("largest difference to the scan on one device:", float(jnp.abs(np.asarray(y) - np.asarray(whole)).max()))
jax.debug.visualize_array_sharding(y[0, :, :, 0], use_color=False)  # [B, L]: time is cut

# %% [markdown]
# Exchanged are 2 B D N numbers a device, whatever L is:

# %%
for length in (64, 1024, 65_536):
    print(f"L = {length:>6}: a device holds {M * B * length // 8 * D:>8,} inputs and exchanges {2 * B * D * N} numbers")
