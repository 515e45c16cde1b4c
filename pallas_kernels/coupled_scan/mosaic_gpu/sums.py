"""Running sums of the parameters' gradients in the backward kernel."""

from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels._compat import layout_cast
from pallas_kernels.coupled_scan.mosaic_gpu import tile as tl
from pallas_kernels.coupled_scan.mosaic_gpu.plan import F32, Plan
from pallas_kernels.coupled_scan.mosaic_gpu.tile import Refs


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
        self.names = ["dA"] + (["dgain"] if plan.coupling == "shared" and not plan.threads.tensor else [])
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

    def store(self, sums: dict[str, Any]) -> None:
        """The inverse of `load`."""
        for name in self.names:
            for j, rows in enumerate(sums[name]):
                for i, value in enumerate(rows):
                    tl.store(self.refs[name].at[j, :, i, self.columns], value)
        for j, rows in enumerate(sums.get("dweights", [])):
            for k, value in enumerate(rows):
                tl.store(self.weights.at[j, k, :, self.columns], value)


def load_rows(plan: Plan, ref: Any, part: int, *, resumed: bool) -> list:
    """The sums for skip and dt_bias, `part` rows of each for every modality: of the segments before, or zero."""
    if resumed:
        return [tuple(tl.load_rows(plan, ref.at[k, m], part) for k in range(2)) for m in range(plan.M)]
    zero = layout_cast(jnp.zeros((part, plan.threads.channels), F32), plan.threads.over_steps(part))
    return [(zero, zero) for _ in range(plan.M)]


def store_rows(ref: Any, rows: list) -> None:
    """The inverse of `load_rows`."""
    for m, values in enumerate(rows):
        for k, value in enumerate(values):
            tl.store(ref.at[k, m], value)
