"""Configuration: frozen dataclasses that hold values and no logic.

Every field can be overridden on the command line, e.g. ``--model.d-state 16``.
Fields that are ``None`` or ``"auto"`` are resolved when the experiment is built;
``cmamba info CONFIG`` prints the resolved values.
"""

import dataclasses
from typing import Literal

CouplingName = Literal["shared", "full", "independent", "released", "cross_attention"]
TaskKind = Literal["classification", "regression", "multilabel"]
Granularity = Literal["sequence", "step"]
MetricSet = Literal["auto", "mosi", "sims", "mmsa_classification", "omics"]


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
    """Layers of coupled blocks; 0: encoders and head only."""
    coupling: CouplingName = "shared"
    """Coupling of the states: shared (Eq. 6), full (Eq. 5), independent, or the published code's (released); or
    attention between the modalities instead of scans (cross_attention)."""
    early_fusion: Literal["none", "average", "concat"] = "none"
    """One stream instead of one a modality, fused after the encoders by a mean or by a linear map of all of them."""
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
    n_heads: int = 4
    """Attention heads of coupling "cross_attention"."""
    head_hidden: int = 64
    """Hidden units of the head (Linear-ReLU-Linear)."""
    dropout: float = 0.0
    """Dropout on the output of each block and before the head (not stated in the paper)."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of activations and matrix products; parameters and scan states stay float32."""
    remat: Literal["none", "layer", "dots"] = "none"
    """What the backward pass computes again instead of keeping it: nothing, whole layers (the least memory), or all
    of a layer but its matrix products."""
    scan: str | None = None
    """Implementation of the coupled scan; None: the fastest tested one for this device. The convolution before it is
    XLA's unless this is None or "mosaic_gpu"."""


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


@dataclasses.dataclass(frozen=True)
class MosiContextualConfig:
    """CMU-MOSI by utterance: one video is one sequence, with a label at every utterance."""

    path: str = ""
    """Folder of {text,audio,video}_{train,test}.csv and manifest.csv."""
    data_dir: str = "~/.cache/cmamba_jax"
    """Where the prepared records are kept."""
    valid_fraction: float = 0.2
    """Share of the training videos that is held out for validation."""
    split_seed: int = 0
    """Seed that draws the validation videos."""


@dataclasses.dataclass(frozen=True)
class OmicsConfig:
    """Multi-omics classification in MOGONET's layout: ROSMAP, BRCA. Features are scaled to 0..1."""

    path: str = ""
    """Folder of {1,2,3}_{tr,te}.csv and labels_{tr,te}.csv."""
    data_dir: str = "~/.cache/cmamba_jax"
    """Where the prepared records are kept."""
    n_steps: int = 1
    """Steps of the sequence that a view becomes, each a group of consecutive features; the published code uses 1."""
    valid_fraction: float = 0.2
    """Share of the training rows that is held out for validation, stratified by class."""
    split_seed: int = 0
    """Seed that draws the validation rows."""


@dataclasses.dataclass(frozen=True)
class MmsaConfig:
    """CMU-MOSI, CMU-MOSEI, CH-SIMS or CH-SIMSv2 in a feature file of MMSA, aligned or unaligned."""

    path: str = ""
    """The file, such as aligned_50.pkl or unaligned_50.pkl."""
    dataset: Literal["mosi", "mosei", "sims", "simsv2"] = "mosei"
    data_dir: str = "~/.cache/cmamba_jax"
    """Where the prepared records are kept."""
    task: Literal["regression", "classification"] = "regression"
    """The sentiment as a number, or as negative, neutral or positive."""
    length: int | None = None
    """Steps that all modalities are brought to; None: those of the text."""
    resample: Literal["mean", "nearest", "frames"] = "mean"
    """What a window of steps becomes: its mean (the published code), one of them, or all side by side (learned)."""
    span: Literal["padded", "true"] = "padded"
    """The windows divide the steps with the file's padding (the published code), or the true steps of each sample."""
    counts: Literal["published", "any"] = "published"
    """The file has to hold as many samples as the published one, or may hold any number."""


@dataclasses.dataclass(frozen=True)
class MmImdbConfig:
    """MM-IMDb: genres of films from plot and poster, in MultiBench's file."""

    path: str = ""
    """The file multimodal_imdb.hdf5."""
    data_dir: str = "~/.cache/cmamba_jax"
    """Where the prepared records are kept."""
    n_steps: int = 1
    """Steps of the sequence that each vector becomes, each a group of consecutive features."""


DataConfig = WatchConfig | SyntheticConfig | NpzConfig | MosiContextualConfig | OmicsConfig | MmsaConfig | MmImdbConfig


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
    swap: float = 0.0
    """Probability that a step of a modality shows the features of a random step of the same sample: keeps a model from
    trusting single steps, where features know the training labels."""
    mirror: tuple[float, ...] = ()
    """Signs (1 or -1) of all features, modality after modality, in a mirror image: half of the samples take it."""


@dataclasses.dataclass(frozen=True)
class MissingConfig:
    """Part of the normalised inputs removed at random."""

    kind: Literal["none", "element", "modality", "step"] = "none"
    """What is missing: single numbers (Table 12 of the paper), whole modalities but for one, or time steps (MMSA)."""
    rate: float = 0.0
    """Probability that a number, a modality or a step is missing."""
    modalities: tuple[str, ...] = ()
    """Modalities that lose something; empty: all."""
    marking: Literal["mask", "zeros"] = "mask"
    """What the model sees of missing modalities and steps: False in the masks, or zeros as in MMSA."""
    seed: int = 0
    """Seed of what is missing at evaluation; training draws anew in every epoch, from the seed of the run."""


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
    missing: MissingConfig = MissingConfig()
    """What is removed from the training samples (modality dropout); validation and test samples stay whole."""
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
    seeds: tuple[int, ...] = ()
    """Seeds that are trained together, in one compiled step; empty: `seed` alone."""
    track_test: bool = False
    """With `seeds`: score the test split after every epoch too, and report apart what choosing the epoch on it would
    give, as some publications do. Nothing is chosen by it."""
    loss: Literal["auto", "l1", "mse", "cross_entropy", "bce"] = "auto"
    """auto: cross_entropy (classification), l1 (regression), bce (multilabel)."""
    label_smoothing: float = 0.0
    monitor: str = "loss"
    """Validation metric that chooses the best checkpoint and stops early."""
    patience: int | None = None
    """Epochs without improvement before stopping; None: never stop early."""
    checkpoint_every: int = 1
    """Epochs between two checkpoints of the full training state."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept besides the best; older ones are deleted."""
    profile_steps: int = 0
    """Steps that JAX's profiler traces into RUN_DIR/profile; 0: none."""
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
class EvaluationConfig:
    """How predictions are scored."""

    metrics: MetricSet = "auto"
    """auto: by the kind of task; mosi, sims, mmsa_classification: MMSA's; omics: accuracy with F1 and AUC or F1s."""
    thresholds: tuple[float, ...] = (0.5,)
    """Probabilities above which a label counts as predicted (multilabel): one for all labels, or one for each."""


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How a run is spread over devices; results are those of one device whatever is chosen."""

    strategy: Literal["jit", "pmap"] = "jit"
    """jit: one program partitioned over the mesh below (NamedSharding); pmap: a plain replica on each of `data`
    devices, which exchange gradients only."""
    data: int = 1
    """Devices that share out the samples of a batch; 0: all that the other axes leave."""
    fsdp: int = 1
    """Devices that share out samples, and parameters and optimizer state too."""
    tensor: int = 1
    """Devices that share out the channels D of the scan."""
    sequence: int = 1
    """Devices that share out the time steps L of a sequence."""
    multi_host: Literal["auto", "on", "off"] = "auto"
    """Whether several processes train together; auto: where Slurm, Open MPI or a TPU pod started them."""
    coordinator: str | None = None
    """Address HOST:PORT of process 0, for processes that one started oneself; None: from the cluster."""
    num_processes: int | None = None
    """Processes that train together."""
    process_id: int | None = None
    """Number of this process, from 0."""
    heartbeat_seconds: int = 100
    """Time without a sign of life after which a process counts as dead, and the others stop."""


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
    evaluation: EvaluationConfig = EvaluationConfig()
    parallel: ParallelConfig = ParallelConfig()
    paper: str = ""
    """What a publication reports for this experiment, for people to compare with; nothing reads it."""


@dataclasses.dataclass(frozen=True)
class SweepRow:
    """One row of a sweep's table."""

    label: str = ""
    """Name of the row, and of its folder."""
    changes: tuple[tuple[str, object], ...] = ()
    """Fields that differ from the base, with their values: (("model.coupling", "full"), ("model.d_state", 32))."""
    paper: str = ""
    """What a publication reports for this row."""


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """A table of experiments that differ in a few fields, for `cmamba sweep`."""

    name: str = "sweep"
    """Name of the sweep and of its folder."""
    base: ExperimentConfig = ExperimentConfig("base")
    """What all rows share; `base.train.seeds` are trained together in every row."""
    rows: tuple[SweepRow, ...] = ()
    widths: Literal["same", "equal_parameters"] = "same"
    """equal_parameters: every row takes the d_model that gives it as many parameters as the base, within 5%."""
    folds: Literal["one", "all"] = "one"
    """all: every row is a cross-validation over the folds of the data."""
    metrics: tuple[str, ...] = ()
    """Columns of the Markdown table; empty: all metrics of the task."""
    note: str = ""
    """What a reader of the table should know; RESULTS.md prints it."""
    missing: tuple[MissingConfig, ...] = ()
    """Missing data at which the test split is scored as well, after training."""
