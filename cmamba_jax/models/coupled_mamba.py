"""CoupledMamba: encoders, a stack of coupled blocks, pooling over time, fusion and head (Figure 1 of the paper)."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from cmamba_jax.batch import Batch
from cmamba_jax.config import ModelConfig, TaskConfig
from cmamba_jax.errors import UserError
from cmamba_jax.models import attention, functional, heads, partition
from cmamba_jax.models.block import CoupledMambaBlock, LayerCoupling, draw
from cmamba_jax.models.encoders import Encoder
from cmamba_jax.models.ssm import SSMState

_REMAT = {
    "layer": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
}
"""What the backward pass keeps of a layer besides its input: nothing, or its matrix products."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelState:
    """What the model carries from one step to the next; its size does not depend on the length of the sequence.

    Attributes:
        encoders: inputs that the encoders still need, per modality [B, W, F].
        layers: states of each layer, by direction.
        pool: pooling over the steps so far.
    """

    encoders: dict[str, Array]
    layers: tuple[dict[str, SSMState], ...]
    pool: heads.PoolState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelOutput:
    """Result of a forward pass.

    Attributes:
        logits: float32 [B, K] (per sequence; `step`: the sequence so far) or [B, L, K] (per step): class logits,
            regression values, or logits of each label.
        state: continues the sequence: `model(more, state=state)` or `model.step(state, ...)`.
    """

    logits: Array
    state: ModelState


@dataclasses.dataclass(frozen=True)
class CouplingTable:
    """A learned coupling, for inspection.

    Attributes:
        layer: index of the layer.
        direction: "forward" or "backward" in time, or "between layers".
        kind: "gain", g [M, N]; "weights", W [M, M] (row: reading modality); "layer", Frobenius norm of the matrix
            from each modality (column) to each other (row), [M, M].
        values: the table.
    """

    layer: int
    direction: str
    kind: str
    values: np.ndarray


class CoupledMamba(nnx.Module):
    """Coupled Mamba for M modalities.

    Args:
        config: architecture; the defaults are the paper's.
        features: width F of each modality; the order of the keys is the order of the modalities.
        task: what to predict.
        rngs: source of the initial parameters.

    Raises:
        UserError: the configuration does not fit together.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from cmamba_jax.config import ModelConfig
        >>> from cmamba_jax.models import CoupledMamba
        >>> config = ModelConfig(d_model=16, d_state=4, n_layers=1)
        >>> model = CoupledMamba(config, features={"text": 8, "audio": 3}, rngs=nnx.Rngs(0))
        >>> out = model({"text": jnp.ones((2, 5, 8)), "audio": jnp.ones((2, 5, 3))})
        >>> out.logits.shape
        (2, 1)
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        features: Mapping[str, int],
        task: TaskConfig = TaskConfig(),  # noqa: B008 (frozen)
        rngs: nnx.Rngs,
    ):
        m = len(features)
        if m == 0:
            raise UserError("features: expected at least one modality, got none")
        streams = 1 if config.early_fusion != "none" else m
        if config.coupling == "released" and streams == 1:
            raise UserError("coupling 'released' mixes modalities: it needs at least 2, got 1; use 'independent'")
        if config.frame > 1 and task.per == "step":
            raise UserError(f"frame {config.frame} merges steps, but the task has one prediction per step; use frame 1")
        self.config = config
        self.task = task
        self.features = tuple(features.items())
        self.n_streams = streams
        self.encoders = nnx.Dict(
            {name: Encoder(config, config.frame * width, rngs=rngs) for name, width in features.items()}
        )
        if config.early_fusion != "none":
            self.join = attention.EarlyFusion(config, m, rngs=rngs)
        block = attention.CrossAttentionBlock if config.coupling == "cross_attention" else CoupledMambaBlock
        self.blocks = nnx.List([block(config, streams, rngs=rngs) for _ in range(config.n_layers)])
        n_mixes = max(config.n_layers - 1, 0) if config.coupling == "released" else 0
        self.mixes = nnx.List([LayerCoupling(config, streams, rngs=rngs) for _ in range(n_mixes)])
        if config.block_norm == "pre":
            self.norm_scale = nnx.Param(jnp.ones((streams, config.d_model), jnp.float32))
            self.norm_bias = nnx.Param(jnp.zeros((streams, config.d_model), jnp.float32))
        self.head = heads.FusionHead(config, streams, task.n_outputs, rngs=rngs)

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities, in the order of axis M."""
        return tuple(name for name, _ in self.features)

    def init_state(self, batch_size: int) -> ModelState:
        """The state before the first step of `batch_size` sequences."""
        dtype = jnp.dtype(self.config.compute_dtype)
        return ModelState(
            encoders={name: encoder.init_state(batch_size) for name, encoder in self.encoders.items()},
            layers=tuple(
                {direction: ssm.init_state(batch_size, dtype) for direction, ssm in block.ssms().items()}
                for block in self.blocks
            ),
            pool=heads.init_pool(self.config.pooling, (self.n_streams, batch_size, self.config.d_model)),
        )

    def __call__(
        self,
        batch: Batch | Mapping[str, Array],
        *,
        train: bool = False,
        rngs: nnx.Rngs | None = None,
        state: ModelState | None = None,
    ) -> ModelOutput:
        """Predicts from whole sequences, or from the next part of them.

        Args:
            batch: a `Batch`, or just its inputs: modality -> [B, L, F_m].
            train: apply dropout.
            rngs: source of the dropout's random numbers, `nnx.Rngs(dropout=key)`; needed if train and dropout > 0.
            state: result of the steps before these; None: the sequences start here. With frames, every part but the
                last has to be a multiple of the frame.

        Returns:
            Logits and the state that continues the sequences.

        Raises:
            UserError: the inputs do not fit the model.
        """
        if not isinstance(batch, Batch):
            batch = Batch(inputs=dict(batch))
        self._check(batch, train, rngs, state)
        batch = jax.tree.map(jnp.asarray, batch)
        rngs = rngs if train else None
        if state is None:
            state = self.init_state(batch.inputs[self.modalities[0]].shape[0])
        reset = batch.reset

        encoded, masks, windows = [], [], {}
        for name in self.modalities:
            steps, seen = functional.frames(
                batch.inputs[name], None if batch.mask is None else batch.mask[name], self.config.frame
            )
            out, windows[name] = self.encoders[name](steps, mask=seen, reset=reset, window=state.encoders[name])
            encoded.append(out)
            masks.append(seen)
        x = partition.constrain(jnp.stack(encoded), "MBLF")
        seen = None if batch.mask is None else jnp.stack(masks)
        if self.config.early_fusion != "none":
            x, seen = self.join(x, mask=seen)
        if self.config.coupling == "cross_attention":
            x = functional.keep(x + attention.positions(x.shape[2], x.shape[3], reset), seen)

        layers = []
        for i, block in enumerate(self.blocks):
            apply = functools.partial(block, mask=seen, reset=reset, key=draw(self.config.dropout, rngs))
            if self.config.remat != "none":
                apply = jax.checkpoint(apply, policy=_REMAT[self.config.remat])
            x, layer = apply(x, state=state.layers[i])
            layers.append(layer)
            if i < len(self.mixes):
                x = self.mixes[i](x, mask=seen)
        if self.config.block_norm == "pre":
            x = functional.layer_norm(x, self.norm_scale[...], self.norm_bias[...])
        x = functional.keep(x, seen)

        pooled = state.pool
        if self.task.per == "step":
            present = jnp.ones(x.shape[:3], bool) if seen is None else seen
            logits = self.head(x, present, rngs=rngs)
        else:
            pooled = heads.pool(self.config.pooling, state.pool, x, seen)
            logits = self.head(heads.pooled(self.config.pooling, pooled), pooled.count > 0, rngs=rngs)
        return ModelOutput(logits, ModelState(encoders=windows, layers=tuple(layers), pool=pooled))

    def step(
        self,
        state: ModelState,
        inputs: Mapping[str, Float[Array | np.ndarray, "B *frame F"]],
        *,
        mask: Mapping[str, Array] | None = None,
        reset: Array | None = None,
    ) -> ModelOutput:
        """Advances one step: streaming inference with constant memory.

        L steps give what one call on L steps gives.

        Args:
            state: from `init_state`, `step` or a call of the model.
            inputs: modality -> [B, F_m], or [B, frame, F_m] for a model with frames.
            mask: modality -> bool [B] ([B, frame]), False where its sample is missing; None: all there.
            reset: bool [B], True where a new sequence starts (predictions per step only).

        Returns:
            Logits [B, K], of this step or of the sequence so far, and the state after it.
        """
        batch = Batch(inputs=dict(inputs), mask=None if mask is None else dict(mask), reset=reset)
        if self.config.frame == 1:
            batch = jax.tree.map(lambda v: v[:, None], batch)
        out = self(batch, state=state)
        return ModelOutput(out.logits[:, 0] if self.task.per == "step" else out.logits, out.state)

    def coupling_tables(self) -> list[CouplingTable]:
        """The learned couplings of all layers; none for independent chains or the literal gain g = 1."""
        tables = []
        for i, block in enumerate(self.blocks):
            for direction, ssm in block.ssms().items():
                if hasattr(ssm, "gain"):
                    tables.append(CouplingTable(i, direction, "gain", np.exp(ssm.coupling().log_gain)))
                if hasattr(ssm, "mix"):
                    tables.append(CouplingTable(i, direction, "weights", np.asarray(ssm.coupling().weights)))
        for i, mix in enumerate(self.mixes):
            tables.append(CouplingTable(i, "between layers", "layer", mix.norms()))
        return tables

    def _check(self, batch: Batch, train: bool, rngs: nnx.Rngs | None, state: ModelState | None) -> None:
        """Raises UserError where a batch does not fit the model."""
        expected = ", ".join(f"{name} [B, L, {width}]" for name, width in self.features)
        for kind, given in (("inputs", batch.inputs), ("mask", batch.mask)):
            if given is not None and set(given) != set(self.modalities):
                raise UserError(
                    f"{kind}: expected the modalities {', '.join(self.modalities)}, got {', '.join(given) or 'none'}; "
                    "for a missing modality pass zeros and a mask that is False"
                )
        shapes = {name: tuple(value.shape) for name, value in batch.inputs.items()}
        lead = next(iter(shapes.values()))[:2]
        for name, width in self.features:
            if len(shapes[name]) != 3 or shapes[name][:2] != lead or shapes[name][2] != width:
                raise UserError(f"inputs: expected {expected} with one B and L, got {shapes}")
        for name in self.modalities:
            if batch.mask is not None and tuple(batch.mask[name].shape) != lead:
                raise UserError(f"mask of {name}: expected bool {list(lead)}, got {list(batch.mask[name].shape)}")
        if batch.reset is not None and self.task.per == "sequence":
            raise UserError("reset: packed sequences need predictions per step; this model predicts per sequence")
        if self.config.direction == "bidirectional" and state is not None:
            raise UserError("a bidirectional model needs the whole sequence: it cannot continue one; use 'causal'")
        if self.config.coupling == "cross_attention" and state is not None:
            raise UserError("attention needs the whole sequence: it cannot continue one; use another model.coupling")
        if train and self.config.dropout > 0 and rngs is None:
            raise UserError("training with dropout needs random numbers: pass rngs=nnx.Rngs(dropout=key)")
