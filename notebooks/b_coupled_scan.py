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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/cmamba_jax/blob/main/notebooks/b_coupled_scan.ipynb)
#
# # The coupled scan explained
#
# M modalities each carry a state h. In a coupled scan every modality reads the states of all others at every step:
#
#     h_t^m = a_t^m g^m (h_{t-1}^1 + ... + h_{t-1}^M) + u_t^m
#
# with a_t = exp(dt_t A) < 1 and u_t = dt_t x_t B_t (Eq. 6 and 9 of the paper). Four facts, each computed below.

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

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from pallas_kernels import Shared, coupled_scan, coupled_scan_step

REDUCED = bool(os.environ.get("CMAMBA_NOTEBOOK_REDUCED"))  # In our tests: shorter sequences.
M, B, L, D, N = 3, 1, 64 if REDUCED else 512, 4, 8
keys = jax.random.split(jax.random.key(0), 6)
x, dt = jax.random.normal(keys[0], (M, B, L, D)), jax.random.normal(keys[1], (M, B, L, D)) - 2
A = -jnp.exp(jax.random.normal(keys[2], (M, D, N)))
b, c = jax.random.normal(keys[3], (M, B, L, N)), jax.random.normal(keys[4], (M, B, L, N))
coupling = Shared(log_gain=jax.nn.log_softmax(jax.random.normal(keys[5], (M, N)), axis=0))

# %% [markdown]
# ## 1. The recurrence, written down
# A loop over time in numpy, with nothing clever.

# %%
step_size = np.logaddexp(0, np.asarray(dt, np.float64))  # softplus
a = np.exp(step_size[..., None] * np.asarray(A, np.float64)[:, None, None])  # [M, B, L, D, N]
u = (step_size * np.asarray(x))[..., None] * np.asarray(b)[:, :, :, None, :]
g = np.exp(np.asarray(coupling.log_gain, np.float64))[:, None, None, :]

h = np.zeros((M, B, D, N))
states = []
for t in range(L):
    h = a[:, :, t] * g * h.sum(axis=0) + u[:, :, t]
    states.append(h)
y = np.stack([(h * np.asarray(c)[:, :, t, None, :]).sum(-1) for t, h in enumerate(states)], axis=2)

out = coupled_scan(x, dt, A, b, c, coupling=coupling)
print("largest difference to coupled_scan:", float(np.abs(out.y - y).max()))

# %% [markdown]
# ## 2. One chain carries all modalities
# The sum H_t = h_t^1 + ... + h_t^M obeys a recurrence of its own: H_t = s_t H_{t-1} + v_t with s = g^1 a^1 + ... and
# v = u^1 + ... So one associative scan over H, whatever M is, gives every h_t^m = g^m a_t^m H_{t-1} + u_t^m.

# %%
s, v = (g[:, :, None] * a).sum(0), u.sum(0)  # [B, L, D, N]
_, H = jax.lax.associative_scan(lambda p, q: (p[0] * q[0], q[0] * p[1] + q[1]), (s, v), axis=1)
print("largest difference:", float(np.abs(np.asarray(H)[:, -1] - states[-1].sum(0)).max()))
print("carried state of coupled_scan:", out.final_state.shape, "- no axis M")

# %% [markdown]
# ## 3. Why the gain
# Without it (g = 1) three slowly decaying modalities feed each other: the states grow by almost 3 at every step and
# float32 overflows. With g = softmax over the modalities every step is a weighted mean, and nothing can grow.

# %%
length = 100
ones = jnp.ones
slow = {"x": ones((M, 1, length, 1)), "dt": jnp.full((M, 1, length, 1), 0.01), "A": -ones((M, 1, 1))}
slow |= {"B": ones((M, 1, length, 1)), "C": ones((M, 1, length, 1)), "dt_softplus": False}
figure, axes = plt.subplots(figsize=(5, 2.6), layout="constrained")
for name, log_gain in (("g = 1", 0.0), ("g = softmax: 1 / M", -np.log(M))):
    course = coupled_scan(**slow, coupling=Shared(jnp.full((M, 1), log_gain))).y[0, 0, :, 0]
    axes.semilogy(np.where(np.isfinite(course), course, np.nan), label=name)
    print(f"{name}: {int(np.isfinite(course).sum())} of {length} steps are finite")
axes.set(xlabel="step", ylabel="state")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## 4. Scan = chunks = steps
# The same result at once, in two parts (the state of the first is the start of the second), and step by step.

# %%
cut = L // 3
parts = {"x": x, "dt": dt, "B": b, "C": c}
first = coupled_scan(A=A, coupling=coupling, **{k: v[:, :, :cut] for k, v in parts.items()})
second = coupled_scan(
    A=A, coupling=coupling, initial_state=first.final_state, **{k: v[:, :, cut:] for k, v in parts.items()}
)
chunks = jnp.concatenate([first.y, second.y], axis=2)

advance = jax.jit(lambda state, now: coupled_scan_step(state, A=A, coupling=coupling, **now))
state, steps = jnp.zeros((B, D, N)), []
for t in range(L):
    result = advance(state, {k: v[:, :, t] for k, v in parts.items()})
    state = result.final_state
    steps.append(result.y)
print("chunks:", float(jnp.abs(chunks - out.y).max()), " steps:", float(jnp.abs(jnp.stack(steps, 2) - out.y).max()))

# %% [markdown]
# What one modality leaves in another: an input of modality 0 alone, read by all three.

# %%
pulse = jnp.zeros_like(x).at[0, :, 5].set(1.0)
y = np.abs(coupled_scan(pulse, dt, A, b, c, coupling=coupling).y[:, 0]).mean(-1)
figure, axes = plt.subplots(figsize=(5, 1.8), layout="constrained")
image = axes.imshow(y[:, :40], aspect="auto", cmap="Blues")
axes.set(xlabel="step", ylabel="modality", yticks=range(M), title="a pulse in modality 0 at step 5")
figure.colorbar(image)
plt.show()
