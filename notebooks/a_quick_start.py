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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/cmamba_jax/blob/main/notebooks/a_quick_start.ipynb)
#
# # Quick start: recognise exercises from a watch
#
# Two sensors of a smart watch, accelerometer and gyroscope, at 50 samples a second; seven shoulder exercises; people
# that the model has never seen. Training takes about two minutes on two CPU cores.

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
# ## Train
# The configuration is a plain dataclass. People differ in speed, strap and arm, so the training windows are rotated,
# mirrored and warped in time.

# %%
import os
import tempfile

from cmamba_jax import (
    AugmentConfig,
    ExperimentConfig,
    ModelConfig,
    OptimizerConfig,
    PipelineConfig,
    TrainConfig,
    WatchConfig,
    fit,
    load_run,
)

REDUCED = bool(os.environ.get("CMAMBA_NOTEBOOK_REDUCED"))  # In our tests: one epoch, fewer windows.

config = ExperimentConfig(
    name="watch",
    data=WatchConfig(window=100, stride=400 if REDUCED else 50),
    model=ModelConfig(
        d_model=8 if REDUCED else 32,
        d_state=4 if REDUCED else 16,
        n_layers=2,
        frame=4,  # four samples make a step
        encoder="conv",
        encoder_width=3,
        pooling="mean",
        fusion="concat",
        dropout=0.1,
    ),
    pipeline=PipelineConfig(
        batch_size=64,
        augment=AugmentConfig(jitter=0.05, scale=0.15, rotation=30.0, time_warp=0.25, mirror=(-1, 1, 1, 1, -1, -1)),
    ),
    optimizer=OptimizerConfig(
        name="adamw", learning_rate=2e-3, weight_decay=0.05, schedule="cosine", warmup_epochs=1.0
    ),
    train=TrainConfig(
        epochs=1 if REDUCED else 12,
        monitor="accuracy",
        label_smoothing=0.1,
        output=tempfile.mkdtemp(),
        progress="off",
    ),
)
result = fit(config)
{name: round(value, 4) for name, value in result.metrics["test"].items()}

# %% [markdown]
# ## Look at it
# The run folder holds a report. Its pictures: learning curves, ...

# %%
from IPython.display import Image, display

pictures = result.report.parent
display(Image(pictures / "accuracy.png", width=480))

# %% [markdown]
# ... the confusion matrix of the people that were held out, ...

# %%
display(Image(pictures / "confusion_matrix.png", width=480))

# %% [markdown]
# ... and the learned coupling: how much of the shared state each modality takes up, for every state of the scan.

# %%
display(Image(pictures / "coupling_gain.png", width=480))

# %% [markdown]
# ## Use it
# Predictions for arrays, and an explanation of one of them: which samples speak for it, how full the states are, and
# what flows from one modality to the other.

# %%
from cmamba_jax.train.explain import explain

run = load_run(result.run_dir)
inputs, _ = run.sample("test:0")
print(run.predict({name: values[None] for name, values in inputs.items()})[0].labels)
explain(run, inputs, points=16 if REDUCED else 256)

# %% [markdown]
# Live, sample by sample, with constant memory (`cmamba stream` does the same for JSON lines):

# %%
from cmamba_jax.deploy import StreamingSession

session = StreamingSession(run)
for t in range(20):
    answer = session.push({"accelerometer": inputs["accelerometer"][t], "gyroscope": inputs["gyroscope"][t]})
    if answer is not None:
        print(t, answer.labels[0], f"{answer.outputs.max():.2f}")
