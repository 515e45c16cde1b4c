"""Running sums of the parameters' gradients in the backward kernel."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.coupled_scan.mosaic_gpu import tile as tl
from pallas_kernels.coupled_scan.mosaic_gpu import warp
from pallas_kernels.coupled_scan.mosaic_gpu.plan import F32, Plan
from pallas_kernels.coupled_scan.mosaic_gpu.tile import Refs

Array = jax.Array


class Sums:
    """Where the sums of one slab of states lie in device memory.

    With one slab they stay in registers until the end, with several each slab takes them up and puts them back.

    Args:
        plan: the plan.
        out: the outputs of the kernel.
        slab: of states.
        columns: channels of the block.
    """

    def __init__(self, plan: Plan, out: Refs, slab: Any, columns: Any):
        b, c = lax.axis_index("sample"), lax.axis_index("chunk")
        self.names = ["dA"] + (["dgain"] if plan.coupling == "shared" else [])
        self.plan, self.columns = plan, columns
        self.refs = {name: out[name].at[c, b, :, slab] for name in self.names}
        self.weights = out["dweights"].at[c, b] if plan.coupling == "full" else None

    def zero(self) -> dict[str, Any]:
        """All sums zero."""
        zero = tl.fill(self.plan, 0.0)
        sums = {name: [[zero] * self.plan.threads.rows for _ in range(self.plan.M)] for name in self.names}
        if self.weights is not None:
            sums["dweights"] = [[zero] * self.plan.M for _ in range(self.plan.M)]
        return sums

    def load(self) -> dict[str, Any]:
        """The sums so far."""
        m, rows, layout = range(self.plan.M), range(self.plan.threads.rows), self.plan.threads.layout
        sums = {
            name: [[tl.load(self.refs[name].at[j, :, i, self.columns], layout) for i in rows] for j in m]
            for name in self.names
        }
        if self.weights is not None:
            sums["dweights"] = [[tl.load(self.weights.at[j, k, :, self.columns], layout) for k in m] for j in m]
        return sums

    def store(self, sums: dict[str, Any], *, add: bool = False) -> None:
        """The inverse of `load`; `add`: to what is stored."""
        if add:
            sums = jax.tree.map(jnp.add, sums, self.load())
        for name in self.names:
            for j, rows in enumerate(sums[name]):
                for i, value in enumerate(rows):
                    tl.store(self.refs[name].at[j, :, i, self.columns], value)
        for j, rows in enumerate(sums.get("dweights", [])):
            for k, value in enumerate(rows):
                tl.store(self.weights.at[j, k, :, self.columns], value)


def add_pairs(plan: Plan, sums: list[Array], values: list[Array]) -> list[Array]:
    """Adds the values of each thread's two channels: `rows` arrays to half as many, two states in each."""
    threads = plan.threads
    if plan.interpret:
        pairs = [jnp.sum(v.reshape(threads.lanes, -1, 2), axis=2) for v in values]
        packed = [jnp.stack(pairs[k : k + 2], axis=2).reshape(threads.shape) for k in range(0, threads.rows, 2)]
        return [a + v for a, v in zip(sums, packed, strict=True)]
    like = plgpu.ShapeDtypeStruct(threads.shape, F32, layout=threads.layout)
    half = threads.rows // 2

    @plgpu.inline_mgpu(arg_types=[threads.layout] * (half + threads.rows), return_type=[like] * half)
    def add(ctx: Any, *arrays: Any) -> list[Any]:
        del ctx
        arith = warp.dialects()[1]
        before, added = ([warp.values(v) for v in part] for part in (arrays[:half], arrays[half:]))
        pairs = [arith.addf(*v) for v in added]
        return [
            warp.array(threads, [arith.addf(before[k][j], pairs[2 * k + j]) for j in range(2)]) for k in range(half)
        ]

    return list(add(*sums, *values))


def split_pairs(plan: Plan, sums: list[Array]) -> list[Array]:
    """`rows` arrays from what `add_pairs` added up; every other channel is zero."""
    threads = plan.threads
    if plan.interpret:
        pairs = [v.reshape(threads.lanes, -1, 2)[:, :, j] for v in sums for j in range(2)]
        return [jnp.stack([v, jnp.zeros_like(v)], axis=2).reshape(threads.shape) for v in pairs]
    like = plgpu.ShapeDtypeStruct(threads.shape, F32, layout=threads.layout)

    @plgpu.inline_mgpu(arg_types=[threads.layout] * len(sums), return_type=[like] * threads.rows)
    def split(ctx: Any, *arrays: Any) -> list[Any]:
        del ctx
        numbers = [v for array in arrays for v in warp.values(array)]
        zero = warp.dialects()[1].constant(numbers[0].type, 0.0)
        return [warp.array(threads, [v, zero]) for v in numbers]

    return list(split(*sums))
