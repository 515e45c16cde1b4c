"""Configuration: frozen dataclasses that hold values and no logic.

Every field can be overridden on the command line, e.g. ``--model.d-state 16``.
Fields that are ``None`` or ``"auto"`` are resolved when the experiment is built;
``cmamba info CONFIG`` prints the resolved values.
"""

import dataclasses
from typing import Literal

CouplingName = Literal["shared", "full", "independent", "released"]
TaskKind = Literal["classification", "regression", "multilabel"]
Granularity = Literal["sequence", "step"]


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """What the model predicts."""

    kind: TaskKind = "regression"
    """Kind of target."""
    n_outputs: int = 1
    """Classes, regression targets or labels."""
    per: Granularity = "sequence"
    """One prediction per sequence or one per time step."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A CoupledMamba; the defaults are the paper's (arXiv 2405.18014, section 4)."""

    d_model: int = 128
    """Width of the residual stream of each modality."""
    expand: int = 2
    """Channels of the scan, D = expand * d_model."""
    d_state: int = 64
    """State size N of each channel."""
    d_conv: int = 4
    """Width K of the causal depthwise convolution."""
    dt_rank: int | None = None
    """Rank of the step-size projection; None: ceil(d_model / 8)."""
    n_layers: int = 3
    """Layers of coupled blocks."""
    coupling: CouplingName = "shared"
    """Coupling of the states: shared (Eq. 6), full (Eq. 5), independent, or the published code's (released)."""
    unnormalized: bool = False
    """Literal gain g = 1 (shared) or raw weights (full). The states can overflow: see the README."""
    readout: Literal["per_modality", "shared"] = "per_modality"
    """y^m = C^m h^m (Algorithm 1) or y^m = C^m SUM_i h^i (Eq. 8)."""
    direction: Literal["causal", "bidirectional"] = "causal"
    """Bidirectional blocks add a second scan that runs backwards in time."""
    frame: int = 1
    """Consecutive samples stacked into one step of the model (predictions per sequence only)."""
    block_norm: Literal["pre", "both"] = "pre"
    """LayerNorm before each block and after the last one, or before and after each block (the published code's)."""
    encoder: Literal["linear", "conv", "mlp"] = "linear"
    """Per-modality encoder: a linear map; a causal convolution over time and SiLU; or Linear-LayerNorm-ReLU-Linear-
    LayerNorm with 256 hidden units (the published code's)."""
    encoder_width: int = 5
    """Taps of the convolutional encoder."""
    pooling: Literal["max", "mean", "last"] = "max"
    """Pooling over time, for predictions per sequence."""
    fusion: Literal["weighted", "mean", "concat", "late"] = "weighted"
    """Modalities are fused by a softmax-weighted sum, a mean, a concatenation, or by averaging their logits (late)."""
    head_hidden: int = 64
    """Hidden units of the head (Linear-ReLU-Linear)."""
    dropout: float = 0.0
    """Dropout on the output of each block and before the head (not stated in the paper)."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of activations and matrix products; parameters and scan states stay float32."""
    scan: str | None = None
    """Implementation of the coupled scan; None: the fastest tested one for this device."""


@dataclasses.dataclass(frozen=True)
class WatchConfig:
    """Accelerometer + gyroscope of a smart watch: 7 shoulder exercises, 10 people, 50 Hz."""

    source: str | None = None
    """Path of watch_dataset.npy; None: the copy inside the installed package seglearn."""
    data_dir: str = "~/.cache/cmamba_jax"
    """Where the prepared records are kept."""
    window: int = 100
    """Window length in samples (50 samples are one second)."""
    stride: int = 50
    """Samples between the starts of consecutive windows."""
    n_folds: int = 5
    """Folds of the split by subject."""
    fold: int = 0
    """Fold whose subjects are the test set."""
    n_valid_subjects: int = 1
    """Subjects held out of the training folds for validation."""


@dataclasses.dataclass(frozen=True)
class SyntheticConfig:
    """Cued recall: the label needs both modalities, at different times."""

    n_train: int = 4096
    n_valid: int = 512
    n_test: int = 2048
    length: int = 16
    """Time steps."""
    n_classes: int = 4
    """Symbols of the second modality."""
    delay: int = 3
    """Steps from the cue (first modality) to the symbol that is the label (second modality)."""
    noise: float = 0.05
    """Standard deviation of the additive noise."""
    seed: int = 0
    """Seed of the generated samples."""


@dataclasses.dataclass(frozen=True)
class NpzConfig:
    """One's own data: PATH/{train,valid,test}/*.npz, one sample a file."""

    path: str = ""
    """Folder that holds train/, valid/ and test/."""
    task: TaskKind = "classification"
    per: Granularity = "sequence"
    label_key: str = "label"
    """Name of the label array in each file; every other array is a modality [L, F]."""


DataConfig = WatchConfig | SyntheticConfig | NpzConfig


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Random changes of the training samples; zero switches each one off."""

    jitter: float = 0.0
    """Standard deviation of added noise, in units of each normalised feature."""
    scale: float = 0.0
    """Standard deviation of a random log scale, one a modality and sample."""
    rotation: float = 0.0
    """Largest angle in degrees of a random rotation of three-axis modalities (the same for all of a sample)."""
    time_warp: float = 0.0
    """Standard deviation of a random log speed."""
    mirror: tuple[float, ...] = ()
    """Signs (1 or -1) of all features, modality after modality, in a mirror image: half of the samples take it."""


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """From samples to batches of one shape."""

    batch_size: int = 64
    eval_batch_size: int = 256
    buckets: tuple[int, ...] = ()
    """Lengths that batches are padded to; empty: the longest sample of the split."""
    normalize: Literal["standard", "minmax", "none"] = "standard"
    """Feature scaling, fitted on the training samples only."""
    augment: AugmentConfig = AugmentConfig()
    read_threads: int = 2
    """Threads that prepare batches ahead of the training step."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Gradient transformation; the defaults are the paper's."""

    name: Literal["adam", "adamw"] = "adam"
    """adam adds the weight decay to the gradient (the paper's); adamw decouples it."""
    learning_rate: float = 5e-4
    weight_decay: float = 5e-4
    b1: float = 0.9
    b2: float = 0.999
    schedule: Literal["constant", "step", "cosine"] = "step"
    step_epochs: int = 50
    """Epochs between two reductions of the step schedule."""
    step_factor: float = 0.5
    """Factor of each reduction of the step schedule."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up, before any schedule."""
    clip_norm: float | None = 1.0
    """Largest global gradient norm; None: no clipping."""
    accumulate: int = 1
    """Batches whose gradients are averaged for one update."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The training run."""

    epochs: int = 150
    seed: int = 1111
    """Seed of the parameters, the shuffling and the dropout."""
    loss: Literal["auto", "l1", "mse", "cross_entropy", "bce"] = "auto"
    """auto: cross_entropy (classification), l1 (regression), bce (multilabel)."""
    label_smoothing: float = 0.0
    monitor: str = "loss"
    """Validation metric that chooses the best checkpoint and stops early."""
    patience: int | None = None
    """Epochs without improvement before stopping; None: never stop early."""
    checkpoint_every: int = 1
    """Epochs between two checkpoints of the full training state."""
    log_every: int = 10
    """Steps between two log records."""
    output: str = "runs"
    """Folder that collects the runs; a run goes to OUTPUT/NAME/NUMBER."""
    run_dir: str | None = None
    """Folder of this run; None: the next free number."""
    resume: bool = False
    """Continue the run in run_dir (None: the newest of this experiment)."""
    progress: Literal["auto", "on", "off"] = "auto"
    """Progress bar; auto: where the output is a terminal or a notebook."""


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """Everything that determines a run."""

    name: str
    """Name of the experiment and of the folder of its runs."""
    data: DataConfig | None = None
    """The data set; None: the samples are given to `fit`."""
    model: ModelConfig = ModelConfig()
    pipeline: PipelineConfig = PipelineConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
