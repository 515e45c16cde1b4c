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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/cmamba_jax/blob/main/notebooks/e_speed_and_memory.ipynb)
#
# # Speed and memory against attention
#
# Fusing three modalities over L steps: a coupled Mamba block against cross-attention, in which every modality attends to
# all others. Measured on whatever device is there; the numbers are of this run and no other.

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
from cmamba_jax.versions import describe_environment

print(describe_environment())

# %% [markdown]
# Both get the same inputs [M, B, L, F]. Memory is what the compiler plans for temporaries of one training step
# (forward and backward); time is the median of some runs.

# %%
import functools
import os
import statistics
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
from flax import nnx

from cmamba_jax import ModelConfig
from cmamba_jax.models.block import CoupledMambaBlock

REDUCED = bool(os.environ.get("CMAMBA_NOTEBOOK_REDUCED"))  # In our tests: two short lengths.
M, B, F, HEADS = 3, 1, 32, 4
LENGTHS = (32, 64) if REDUCED else (128, 256, 512, 1024, 2048)
REPEATS = 2 if REDUCED else 5

# %%
block = CoupledMambaBlock(ModelConfig(d_model=F, d_state=16), M, rngs=nnx.Rngs(0))
graphdef, mamba_params = nnx.split(block, nnx.Param)


def coupled_mamba(params, x):
    module = nnx.merge(graphdef, params)
    state = {name: ssm.init_state(B, jnp.dtype("float32")) for name, ssm in module.ssms().items()}
    return module(x, mask=None, reset=None, state=state, key=None)[0]


# %%
keys = jax.random.split(jax.random.key(0), 4)
attention_params = {n: jax.random.normal(k, (M, F, F)) / F**0.5 for n, k in zip("qkvo", keys)}


attend = jax.vmap(functools.partial(jax.nn.dot_product_attention, is_causal=True))


def cross_attention(params, x):
    """Causal attention of each modality to the L steps of every other one."""
    q, k, v = (jnp.einsum("mblf,mfg->mblg", x, params[n]).reshape(M, B, -1, HEADS, F // HEADS) for n in "qkv")
    total = sum(attend(q, jnp.roll(k, shift, 0), jnp.roll(v, shift, 0)) for shift in range(1, M))
    return x + jnp.einsum("mblf,mfg->mblg", total.reshape(x.shape), params["o"])


# %%
def measure(function, params, length):
    x = jax.random.normal(jax.random.key(1), (M, B, length, F))
    step = jax.jit(jax.grad(lambda params, x: jnp.square(function(params, x)).mean()))
    compiled = step.lower(params, x).compile()
    memory = compiled.memory_analysis().temp_size_in_bytes / 2**20
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        jax.block_until_ready(compiled(params, x))
        times.append(1e3 * (time.perf_counter() - start))
    return memory, statistics.median(times[1:])


results = {"coupled Mamba": [], "cross-attention": []}
print(f"{'L':>6}  " + "  ".join(f"{name:>15} MiB      ms" for name in results))
for length in LENGTHS:
    results["coupled Mamba"].append(measure(coupled_mamba, mamba_params, length))
    results["cross-attention"].append(measure(cross_attention, attention_params, length))
    print(f"{length:>6}  " + "  ".join(f"{r[-1][0]:>19.2f}{r[-1][1]:>8.2f}" for r in results.values()))

# %%
figure, panels = plt.subplots(1, 2, figsize=(7.5, 2.8), layout="constrained")
for axes, column, label in zip(panels, (0, 1), ("temporary memory, MiB", "forward + backward, ms")):
    for name, values in results.items():
        axes.loglog(LENGTHS, [value[column] for value in values], marker="o", label=name)
    axes.set(xlabel="length L", ylabel=label)
panels[0].legend(frameon=False)
figure.suptitle(f"{jax.devices()[0].device_kind}; M {M}, B {B}, width {F}", fontsize=10)
plt.show()

# %% [markdown]
# Attention without a fused kernel holds L x L scores, so its memory grows with the square of L. The scan keeps the
# states at the borders of its chunks only. On a GPU, `jax.nn.dot_product_attention` may use a fused kernel, which does
# not hold the scores: then compare times.
