"""How a problem is cut into tiles, and what the kernels are called with.

Axes: M modality, B batch, L time, D channel, N state; S chains (1 for `shared`, else M).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.coupled_scan.types import Full, Problem, Readout, Shared

LANES = 128
"""Channels a vector register holds side by side."""
STEPS = 8
"""Time steps a loop iteration unrolls: the sublanes of a register, so that rows of y move as whole registers."""
INTERPRETED_STEPS = 1
"""The same when interpreted: XLA:CPU takes up to a minute to compile eight unrolled steps."""
MAX_TILE = 128
"""Most steps a time tile: one register width, so that a tile of B or C transposes into one register column."""
LOG2E = math.log2(math.e)
VMEM_LIMIT = 48 * 2**20
"""Bytes of VMEM a kernel may use; the smallest VMEM of the supported chips is 64 MiB."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static facts of one problem.

    Attributes:
        M, B, L, D, N: sizes of the problem's axes.
        coupling: which of the couplings.
        readout: see `coupled_scan`.
        dt_softplus: see `coupled_scan`.
        masked: whether a mask is given.
        resets: whether resets are given.
        interpret: what `pallas_call` takes: False on a TPU, True or `pltpu.InterpretParams` elsewhere.
    """

    M: int
    B: int
    L: int
    D: int
    N: int
    coupling: Literal["independent", "shared", "full"]
    readout: Readout
    dt_softplus: bool
    masked: bool
    resets: bool
    interpret: Any = False

    @classmethod
    def of(cls, p: Problem, interpret: Any = False) -> "Plan":
        """The plan of a problem of arrays or `jax.ShapeDtypeStruct`s."""
        kind = {Shared: "shared", Full: "full"}.get(type(p.coupling), "independent")
        sizes = dict(zip("MBLD", p.x.shape, strict=True))
        return cls(
            **sizes,
            N=p.A.shape[-1],
            coupling=kind,
            readout=p.readout,
            dt_softplus=p.dt_softplus,
            masked=p.mask is not None,
            resets=p.reset is not None,
            interpret=interpret,
        )

    @property
    def chains(self) -> int:
        """S: carried states."""
        return 1 if self.coupling == "shared" else self.M

    @property
    def tiles(self) -> int:
        """Time tiles; shorter ones for many modalities, for the sake of VMEM."""
        return -(-self.L // (MAX_TILE if self.M <= 4 else MAX_TILE // 2))

    @property
    def tile(self) -> int:
        """Steps a time tile: balanced, and whole registers of 16-bit values."""
        return _round_up(-(-self.L // self.tiles), 16)

    @property
    def states(self) -> int:
        """N rounded up to whole sublanes; the states added have B = C = 0."""
        return _round_up(self.N, 8)

    @property
    def steps(self) -> int:
        """Time steps a loop iteration unrolls."""
        return INTERPRETED_STEPS if self.interpret else STEPS

    @property
    def slab(self) -> int:
        """States that one pass over the time tile carries in registers."""
        return 16 if self.states % 16 == 0 else 8

    @property
    def ragged(self) -> bool:
        """Whether the last time tile reaches beyond L."""
        return self.tiles * self.tile != self.L

    @property
    def flagged(self) -> bool:
        """Whether the kernels read flags: what is masked, idle, reset or beyond L."""
        return self.masked or self.resets or self.ragged

    @property
    def idles(self) -> bool:
        """Whether steps exist at which gains or weights must leave the state alone."""
        return (self.masked or self.ragged) and self.coupling != "independent"

    @property
    def parts(self) -> int:
        """Halves of the batch for the two cores of a megacore chip; parameter gradients are summed over parts."""
        return 2 if self.B % 2 == 0 else 1

    def width(self, most: int) -> int:
        """Channels a block: at most `most`, halved for more than 3 and 6 modalities to stay within the registers."""
        most = most // (1 if self.M <= 3 else 2)
        return max(LANES, min(most, _round_up(self.D, LANES)))

    def groups(self, width: int) -> int:
        """Channel blocks."""
        return -(-self.D // width)


def make_flags(plan: Plan, mask: jax.Array | None, reset: jax.Array | None) -> jax.Array | None:
    """float32 [B, tiles, rows, tile]: rows 0 to M - 1 are 1 where a modality is present, M where none is, M + 1 resets.

    The rows are filled up to a multiple of 8.
    """
    if not plan.flagged:
        return None
    m, b, length = plan.M, plan.B, plan.L
    present = jnp.ones((m, b, length), bool) if mask is None else mask
    present = jnp.pad(present, ((0, 0), (0, 0), (0, plan.tiles * plan.tile - length)))
    reset = jnp.zeros((b, length), bool) if reset is None else reset
    reset = jnp.pad(reset, ((0, 0), (0, plan.tiles * plan.tile - length)))
    rows = jnp.concatenate([present, ~jnp.any(present, axis=0, keepdims=True), reset[None]])
    rows = jnp.pad(rows, ((0, _round_up(m + 2, 8) - m - 2), (0, 0), (0, 0)))
    rows = rows.reshape(-1, b, plan.tiles, plan.tile)
    return jnp.moveaxis(rows, 0, 2).astype(jnp.float32)


def pad_last(values: jax.Array, size: int) -> jax.Array:
    """Zero-pads the last axis to `size`."""
    return jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, size - values.shape[-1])])


def launch(
    kernel: Callable[..., None],
    plan: Plan,
    name: str,
    grid: tuple[int, ...],
    semantics: tuple[str, ...],
    inputs: dict[str, tuple[jax.Array, pl.BlockSpec]],
    outputs: dict[str, tuple[tuple[int, ...], Any, pl.BlockSpec]],
    scratch: dict[str, tuple[int, ...]],
) -> dict[str, jax.Array]:
    """Calls `kernel(plan, inputs, outputs, scratch)`, each a dict of refs, over a grid.

    Args:
        kernel: the kernel.
        plan: its first argument.
        name: what profiles and dumps show.
        grid: grid sizes, the last axis walked fastest.
        semantics: "parallel" or "arbitrary" (sequential) for each grid axis.
        inputs: arrays and their blocks.
        outputs: shapes, dtypes and blocks.
        scratch: shapes of float32 VMEM buffers.

    Returns:
        The output arrays by name.
    """
    # Inside shard_map the outputs vary over the mesh axes that x varies over.
    varying = jax.typeof(inputs["x"][0]).manual_axis_type
    return pl.pallas_call(
        lambda *refs: kernel(plan, *refs),
        grid=grid,
        in_specs=[{key: spec for key, (_, spec) in inputs.items()}],
        out_specs={key: spec for key, (_, _, spec) in outputs.items()},
        out_shape={
            key: jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying)
            for key, (shape, dtype, _) in outputs.items()
        },
        scratch_shapes=[{key: pltpu.VMEM(shape, jnp.float32) for key, shape in scratch.items()}],
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM_LIMIT),
        interpret=plan.interpret,
        name=name,
    )({key: array for key, (array, _) in inputs.items()})


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
