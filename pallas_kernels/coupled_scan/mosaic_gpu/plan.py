"""How a problem is cut into blocks, chunks and tiles, and the layouts of arrays over the threads of a block.

Axes: M modality, B batch, L time, D channel, N state; S chains (1 for `shared`: H = SUM_m h^m, else M).
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.coupled_scan.types import Full, Problem, Readout, Shared

CHANNELS = 64
"""Channels of a block, which is one warpgroup: 16 channels a warp."""
LANES, ROWS = 2, 8
"""A thread has ROWS states of one channel; LANES threads of a warp share the channel."""
SLAB = LANES * ROWS
"""States that a block carries at once; more states are walked slab by slab."""
LOG2E = math.log2(math.e)
SHARED_MEMORY = 227 * 1024
"""Bytes of shared memory a block may have (Hopper)."""
MULTIPROCESSORS = 132
"""Of an H100; only the cost rule `chunks` uses it."""
F32 = jnp.float32


def _tiled(*args: Any) -> Any:
    return plgpu.Layout.TILED(plgpu.Tiling(args[0]), *args[1:])


STATE = _tiled(((LANES, CHANNELS), (16,), (1,)), (-3,), (-4, -2), -1)
"""[LANES, CHANNELS]: warps and 16 lanes over channels, 2 lanes over states. A state is a list of ROWS of these."""


def rows_layout(steps: int) -> Any:
    """[steps, CHANNELS], every element in one thread: for what is done once for each channel and step."""
    if steps % 8 == 0:
        return _tiled(((8, 64), (2, 64), (4,)), (-5,), (-3, -2), -1)
    return _tiled(((4, 64), (2,)), (-3,), (-2,), -1)


def projection_layout(steps: int) -> Any:
    """[steps, SLAB] of B or C."""
    if steps % 8 == 0:
        return _tiled(((8, 16), (2, 16), (1,)), (-5,), (-3, -2), -1)
    return _tiled(((4, 16), (1,)), (-3,), (plgpu.Replicated(2), -2), -1)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static facts of one problem.

    Attributes:
        M, B, L, D, N: sizes of the problem's axes.
        dtype: what x, dt, z, B and C are read as: bfloat16 where all of them are, else float32.
        coupling: which of the couplings.
        readout: see `coupled_scan`.
        dt_softplus: see `coupled_scan`.
        skip, gate: whether D and z are given.
        masked, resets: whether a mask and resets are given.
        interpret: what `plgpu.kernel` takes: None on a GPU.
    """

    M: int
    B: int
    L: int
    D: int
    N: int
    dtype: Any
    coupling: Literal["independent", "shared", "full"]
    readout: Readout
    dt_softplus: bool
    skip: bool
    gate: bool
    masked: bool
    resets: bool
    interpret: Any = None

    @classmethod
    def of(cls, p: Problem, interpret: Any = None) -> "Plan":
        """The plan of a problem of arrays or `jax.ShapeDtypeStruct`s."""
        return cls(
            **dict(zip("MBLD", p.x.shape, strict=True)),
            N=p.A.shape[-1],
            dtype=_dtype(v.dtype for v in (p.x, p.dt, p.z, p.B, p.C) if v is not None),
            coupling={Shared: "shared", Full: "full"}.get(type(p.coupling), "independent"),
            readout=p.readout,
            dt_softplus=p.dt_softplus,
            skip=p.D is not None,
            gate=p.z is not None,
            masked=p.mask is not None,
            resets=p.reset is not None,
            interpret=interpret,
        )

    @property
    def S(self) -> int:
        """Carried chains."""
        return 1 if self.coupling == "shared" else self.M

    @property
    def slabs(self) -> int:
        """Slabs of states; the states added to the last one have B = C = 0."""
        return -(-self.N // SLAB)

    @property
    def groups(self) -> int:
        """Blocks of channels."""
        return -(-self.D // CHANNELS)

    @property
    def padded(self) -> int:
        """Channels of the small arrays: whole blocks."""
        return self.groups * CHANNELS

    @property
    def flagged(self) -> bool:
        """Whether the kernels read flags: what is masked, idle or reset."""
        return self.masked or self.resets

    @property
    def flags(self) -> int:
        """Flags a step: M present, one idle, one kept; filled up, since copies move multiples of 128 bytes."""
        return -(-(self.M + 2) // 8) * 8

    @property
    def chunks(self) -> int:
        """Parts of the sequence that run at once; each but the last is summarised first.

        Two blocks fill a multiprocessor. A chunk more costs a second pass over the decays (about 0.7 of the forward
        pass), so time is only cut where more than half of the multiprocessors would idle. Full would need products of
        M x M matrices and is never cut.
        """
        blocks = self.B * self.groups
        if self.coupling == "full" or blocks > MULTIPROCESSORS:
            return 1
        return max(1, min(2 * MULTIPROCESSORS // blocks, self.L // 256))

    def chunk_steps(self, multiple: int) -> int:
        """Steps a chunk, a multiple of `multiple`; the last one may be shorter."""
        return -(-self.L // (self.chunks * multiple)) * multiple


def _dtype(dtypes: Iterable[Any]) -> Any:
    return jnp.dtype(jnp.bfloat16 if all(dtype == jnp.bfloat16 for dtype in dtypes) else jnp.float32)


def pad_axis(values: jax.Array, axis: int, size: int) -> jax.Array:
    """Zero-pads an axis to `size`."""
    widths = [(0, 0)] * values.ndim
    widths[axis] = (0, size - values.shape[axis])
    return jnp.pad(values, widths) if size != values.shape[axis] else values
