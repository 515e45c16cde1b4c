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

THREADS = 128
"""Of a block: one warpgroup."""
SLAB = 16
"""States that a block carries at once; more states are walked slab by slab."""
LOG2E = math.log2(math.e)
WIDEST = 64
"""Channels of the widest block."""
SHARED_MEMORY = 227 * 1024
"""Bytes of shared memory a block may have (Hopper)."""
MULTIPROCESSORS = 132
"""Of an H100; only the cost rule `chunks` uses it."""
F32 = jnp.float32


def _tiled(*args: Any) -> Any:
    return plgpu.Layout.TILED(plgpu.Tiling(args[0]), *args[1:])


@dataclasses.dataclass(frozen=True)
class Threads:
    """How the threads of a block share its channels and the SLAB states of each.

    Attributes:
        lanes: threads of a warp that share a channel, 2 or 4; a thread has `rows` of its states. Four lanes are
            neighbours, which makes of a warp's channels and states what the tensor cores take and give.
        vector: neighbouring channels of a thread.
        tensor: whether the tensor cores take the products with B and C: they see 11 bits of a factor.
    """

    lanes: int = 2
    vector: int = 1
    tensor: bool = False

    @property
    def channels(self) -> int:
        """Of a block; each warp has a quarter of them."""
        return THREADS * self.vector // self.lanes

    @property
    def rows(self) -> int:
        """States of a thread: those of lane l are l * rows to (l + 1) * rows - 1 of a slab."""
        return SLAB // self.lanes

    @property
    def padded(self) -> int:
        """Distance of the rows of partial sums, so that all lanes write to shared memory without bank conflicts."""
        return self.channels + self.channels // 4

    @property
    def strip(self) -> int:
        """Distance of the rows of modalities that a warp reads or writes at once, without bank conflicts."""
        return self.channels + 8

    @property
    def shape(self) -> tuple[int, int]:
        """[lanes, channels]; a state is a list of `rows` arrays of this shape."""
        return self.lanes, self.channels

    @property
    def layout(self) -> Any:
        """Of [lanes, channels]: warps and lanes over channels, lanes over states."""
        order = (-4, -2) if self.lanes == 2 else (-2, -4)
        return _tiled((self.shape, (self.channels // 4,), (self.vector,)), (-3,), order, -1)

    def over_steps(self, steps: int) -> Any:
        """Layout of [steps, channels], every element in one thread: for what is done once a channel and step."""
        vector = min(4, steps * self.channels // THREADS)
        warp = 32 * vector // self.channels
        if warp == 1:
            return _tiled(((4, self.channels), (vector,)), (-3,), (-2,), -1)
        return _tiled(((4 * warp, self.channels), (warp, self.channels), (vector,)), (-5,), (-3, -2), -1)


NARROW = Threads(lanes=4)
"""Of the forward pass where there are few blocks."""
TENSOR, NARROW_TENSOR = Threads(lanes=4, vector=2, tensor=True), Threads(lanes=4, tensor=True)
"""On the tensor cores: of both passes, and of the forward pass where there are few blocks."""
FACTORS = 4
"""Modalities that the tensor cores take; those a problem does not have are zero."""
FACTOR_LAYOUT = _tiled(((FACTORS, SLAB), (2,)), (plgpu.Replicated(4),), (-2, -3), -1)
"""[FACTORS, SLAB], four modalities of B as the tensor cores take them."""


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
        threads: how they share the work.
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
    threads: Threads = Threads()

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
    def tensor(self) -> bool:
        """Whether the forward pass and the summaries of chunks have kernels on the tensor cores."""
        return self.coupling == "shared" and self.dtype == jnp.bfloat16 and self.slabs == 1 and self.M <= 4

    @property
    def tensor_backward(self) -> bool:
        """Whether the backward pass has a kernel on the tensor cores, which needs the gate."""
        return self.tensor and self.gate

    @property
    def save(self) -> int:
        """Steps between the states that the forward pass saves for the backward pass.

        L / save of them are kept. On the tensor cores they are bfloat16, and the backward pass notes save / 2 in shared
        memory; else float32, save / 8 noted in device memory, the sum of which is least near sqrt(8 L).
        """
        return 32 if self.tensor_backward else 128

    @property
    def saved_dtype(self) -> Any:
        """Of the saved states."""
        return self.dtype if self.tensor_backward else F32

    @property
    def rows(self) -> int:
        """Steps of y, dx, ddt and dz in device memory.

        Where a tile of one sample is contiguous, Pallas makes of its copy a plain one, which does not stop at the end
        of the sample and would overwrite the next one; then the arrays have whole tiles.
        """
        return -(-self.L // 16) * 16 if self.M == 1 and self.D <= WIDEST else self.L

    @property
    def groups(self) -> int:
        """Blocks of channels."""
        return self.padded // self.threads.channels

    @property
    def padded(self) -> int:
        """Channels of the small arrays: whole blocks, whatever `threads` are."""
        return -(-self.D // WIDEST) * WIDEST

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
        if self.coupling == "full" or self.threads.channels < WIDEST or blocks > MULTIPROCESSORS:
            return 1
        return max(1, min(2 * MULTIPROCESSORS // blocks, self.L // 256))

    def forward(self) -> "Plan":
        """The plan of the forward pass: with few blocks, more and narrower ones rather than chunks of time.

        One such block a multiprocessor takes as long as chunks of wide blocks that fill a third of them, their
        summaries included.
        """
        blocks = self.B * self.groups
        few = blocks <= MULTIPROCESSORS and not (self.chunks > 1 and 3 * blocks <= MULTIPROCESSORS)
        # A narrow block beyond D would not be stopped by a plain copy, see `rows`.
        if not few or NARROW.channels >= self.D:
            return dataclasses.replace(self, threads=TENSOR) if self.tensor else self
        return dataclasses.replace(self, threads=NARROW_TENSOR if self.tensor else NARROW)

    def backward(self) -> "Plan":
        """The plan of the backward pass."""
        return dataclasses.replace(self, threads=TENSOR) if self.tensor_backward else self

    def segment_steps(self, chunk: int, multiple: int) -> int:
        """Steps of a chunk that one launch of the backward pass takes (see `segments`): all, or a multiple.

        Each launch costs 20 microseconds, and one segment in six of the sums of dB and dC is little enough.
        """
        count = max(1, min(6, chunk // 256)) if self.groups > 1 else 1
        return chunk if count == 1 else -(-chunk // (count * multiple)) * multiple

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
