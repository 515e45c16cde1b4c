"""How a kernel is launched, a warpgroup a block, and how its blocks fetch their tiles."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._compat import interpreted, is_interpreted, kernel_in_place
from pallas_kernels.coupled_scan.mosaic_gpu.plan import SHARED_MEMORY, Plan
from pallas_kernels.coupled_scan.mosaic_gpu.tile import Refs

LANES = plgpu.CompilerParams(
    approx_math=True, unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
)
"""How all kernels are compiled: as what each thread does, who waits for the others where they say so."""
STAGES = 2
FETCHED = ("x", "dt", "z", "dy", "B", "C", "flags")
"""What a tile can have."""
REBUILT = ("x", "dt", "B", "flags")
"""What finding its states again takes."""
STATES = {"gain": -1} | dict.fromkeys(
    ("A", "state", "saved", "final", "carry", "adjoint", "dA", "dgain", "dstate", "entries", "product", "rest"), -2
)
"""The axis of SLAB states of the arrays that have one; the kernels see it as two, [lanes, rows]."""


class Tiling(NamedTuple):
    """How a block's time is cut, and what lies in its shared memory.

    Attributes:
        steps: of a tile.
        part: steps of it whose partial sums are kept at once.
        tight: for many modalities and states: the states that a tile notes or hands on lie in device memory, and
            partial sums without padding.
    """

    steps: int
    part: int
    tight: bool = False


Scratch = Callable[[Plan, Tiling], dict[str, Any]]
"""Shapes and dtypes of what lies in shared memory."""


def choose_tiling(plan: Plan, scratch: Scratch, choices: Sequence[tuple[int, int]]) -> Tiling:
    """The first choice of steps and part that fits.

    Two blocks should fit into a multiprocessor's shared memory, so that one computes while the other waits.
    """
    tilings = [Tiling(*choice) for choice in choices]
    tight = tilings[-1]._replace(tight=True)
    for budget, candidates in ((SHARED_MEMORY // 2 - 1024, tilings), (SHARED_MEMORY - 1024, [*tilings, tight])):
        for tiling in candidates:
            if sum(map(size, scratch(plan, tiling).values())) <= budget:
                return tiling
    raise ValueError(f"no tile fits into shared memory: {plan}")


def size(ref: Any) -> int:
    """Bytes of shared memory; Pallas aligns to 1024."""
    return -(-math.prod(ref.shape) * jnp.dtype(ref.dtype).itemsize // 1024) * 1024


def launch(
    plan: Plan,
    name: str,
    body: Callable[[Refs, Refs, Refs], None],
    arrays: dict[str, jax.Array],
    out: dict[str, Any],
    shared_memory: Scratch,
    tiling: Tiling,
    chunks: int,
    in_place: Refs | None = None,
) -> dict[str, jax.Array]:
    """Runs `body(inputs, outputs, scratch)`, each a dict of references, for every 64 channels, sample and chunk.

    Args:
        plan: the plan.
        name: what profiles show.
        body: what a warpgroup does.
        arrays: inputs.
        out: shapes and dtypes of the outputs.
        shared_memory: shapes and dtypes of what lies there.
        tiling: argument of `shared_memory`.
        chunks: of time.
        in_place: references to more outputs, states in them as the kernels see them.

    Returns:
        The outputs by name.
    """
    in_place = in_place or {}

    def copies(names: Sequence[str]) -> int:
        return sum(name in shared for name in names)

    names, shared = [*arrays, *in_place, *out], shared_memory(plan, tiling)
    split = (plan.threads.lanes, plan.threads.rows)
    arrays = {k: reshape_states(v, k, split) for k, v in arrays.items()}
    types = {k: jax.ShapeDtypeStruct(split_states(v.shape, k, split), v.dtype) for k, v in out.items()}
    barriers = {"arrived": plgpu.Barrier(num_arrivals=copies(FETCHED), num_barriers=STAGES)}
    if "adjoint" in arrays or "dstate" in in_place:  # the backward pass
        barriers["rebuilt"] = plgpu.Barrier(num_arrivals=copies(REBUILT), num_barriers=STAGES)
    if "saved" in shared:
        barriers["entered"] = plgpu.Barrier()

    def kernel(*refs: Any, **scratch_refs: Any) -> None:
        refs = dict(zip(names, refs, strict=True))
        with interpreted(bool(plan.interpret)):
            body({k: refs[k] for k in arrays}, {k: refs[k] for k in (*in_place, *out)}, scratch_refs)

    build = kernel_in_place if in_place else plgpu.kernel
    call = build(
        kernel,
        out_type=tuple(types.values()),
        scratch_types={k: plgpu.SMEM(v.shape, v.dtype) for k, v in shared.items()} | barriers,
        grid=(plan.groups, plan.B, chunks),
        grid_names=("group", "sample", "chunk"),
        # No sum here is over what several warps have: none needs shared memory.
        compiler_params=dataclasses.replace(LANES, reduction_scratch_bytes=0),
        kernel_name=name,
        interpret=plan.interpret,
    )
    results = call(*arrays.values(), *in_place.values())
    return {k: v.reshape(out[k].shape) for k, v in zip(out, results, strict=True)}


def split_states(shape: tuple[int, ...], name: str, split: tuple[int, int]) -> tuple[int, ...]:
    """A shape as the kernels see it."""
    if name not in STATES:
        return shape
    axis = len(shape) + STATES[name]
    return (*shape[:axis], *split, *shape[axis + 1 :])


def reshape_states(values: jax.Array, name: str, split: tuple[int, int]) -> jax.Array:
    """An array as the kernels see it."""
    return values.reshape(split_states(values.shape, name, split))


def my_columns(plan: Plan) -> Any:
    """The channels of this block."""
    return pl.ds(lax.axis_index("group") * plan.threads.channels, plan.threads.channels)


def fetch(
    inp: Refs,
    scr: Refs,
    arrived: Any,
    b: Any,
    columns: Any,
    start: Any,
    slot: Any,
    steps: int,
    names: Sequence[str] = FETCHED,
) -> None:
    """Starts the copies of a tile of sample b to shared memory; what lies beyond the arrays arrives as zeros."""
    rows = pl.ds(start, steps)

    def copy(key: str) -> None:
        window = (b, rows) if key == "flags" else (slice(None), b, rows, *([columns] if key not in "BC" else []))
        plgpu.copy_gmem_to_smem(inp[key].at[window], scr[key].at[slot], arrived)

    def share(warp: Any) -> None:
        for i, key in enumerate(keys):
            pl.when(warp == i % 4)(functools.partial(copy, key))

    keys = [key for key in names if key in scr]
    if is_interpreted():
        for key in keys:
            copy(key)
    else:
        plgpu.warp_map(share)  # every copy costs its warp about 20 instructions
