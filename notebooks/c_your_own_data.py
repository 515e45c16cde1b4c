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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/cmamba_jax/blob/main/notebooks/c_your_own_data.ipynb)
#
# # Your own data, three modalities, some of it missing
#
# Arrays in, trained model out, in about twenty lines. Then: what happens when a modality fails.

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
# ## Twenty lines
# Heart rate, motion and sound of made-up people who rest, walk or run. Motion tells walking from resting; running
# differs from walking by heart rate and sound. Sequences may differ in length.

# %%
import os
import tempfile

import numpy as np

from cmamba_jax import ExperimentConfig, ModelConfig, OptimizerConfig, TrainConfig, fit, from_arrays, load_run

REDUCED = bool(os.environ.get("CMAMBA_NOTEBOOK_REDUCED"))  # In our tests: fewer people, less training.
rng = np.random.default_rng(0)
N = 120 if REDUCED else 900
labels = rng.integers(0, 3, N)
lengths = rng.integers(20, 41, N)
heart, motion, sound = [], [], []
for label, length in zip(labels, lengths, strict=True):
    heart.append(1.2 * (label == 2) + rng.normal(size=(length, 1)))
    motion.append(1.0 * (label >= 1) * np.sin(np.arange(length))[:, None] + rng.normal(size=(length, 3)))
    sound.append(0.7 * (label == 2) + rng.normal(size=(length, 8)))

# %%
# A third of the people has no sound, and heart rates have gaps.
masks = {
    "heart": [rng.random(length) < 0.8 for length in lengths],
    "sound": [np.full(length, rng.random() < 2 / 3) for length in lengths],
}
splits = from_arrays(
    {"heart": heart, "motion": motion, "sound": sound}, labels, masks=masks, label_names=["rest", "walk", "run"]
)
config = ExperimentConfig(
    name="mine",
    model=ModelConfig(d_model=16, d_state=8, n_layers=1, pooling="mean"),
    optimizer=OptimizerConfig(name="adamw", learning_rate=5e-3, schedule="cosine"),
    train=TrainConfig(epochs=2 if REDUCED else 10, monitor="accuracy", output=tempfile.mkdtemp(), progress="off"),
)
result = fit(config, splits)
run = load_run(result.run_dir)
print("accuracy on people not seen before:", round(result.metrics["test"]["accuracy"], 3))

# %% [markdown]
# ## What is missing
# A mask that is False says that a sample does not exist: the step size is zero there, so the state passes through
# untouched, and whatever the array holds cannot leak in. Each modality in turn taken away altogether:

# %%
samples = [splits.test[i] for i in range(len(splits.test))]
truth = np.array([sample["label"] for sample in samples])
names = np.array(["rest", "walk", "run"])


def accuracy(without=()):
    inputs = {m: [s["inputs"][m] for s in samples] for m in ("heart", "motion", "sound")}
    seen = {m: [s["mask"].get(m, np.ones(len(x), bool)) for s, x in zip(samples, inputs[m])] for m in inputs}
    for m in without:
        seen[m] = [np.zeros(len(x), bool) for x in inputs[m]]
    predicted = [p.labels[0] for p in run.predict(inputs, masks=seen)]
    return np.mean(names[truth] == np.array(predicted))


accuracies = {"all": accuracy()} | {f"no {m}": accuracy([m]) for m in ("heart", "motion", "sound")}
accuracies

# %%
import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(4.5, 2), layout="constrained")
axes.barh(list(accuracies), list(accuracies.values()))
axes.axvline(1 / 3, color="grey", linestyle=":", label="chance")
axes.invert_yaxis()
axes.set(xlabel="accuracy", xlim=(0, 1))
axes.legend(frameon=False, loc="lower right")
plt.show()

# %% [markdown]
# ## Which one speaks?
# Integrated gradients, state energy and coupling flow for one person.

# %%
from cmamba_jax.train.explain import explain

found = explain(run, samples[0]["inputs"], masks=samples[0]["mask"], points=16 if REDUCED else 256)
print("true:", names[truth[0]], " predicted:", found.label[0], " shares:", found.shares())
found
