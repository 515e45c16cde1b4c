"""The backward pass in segments of time, one launch of the kernel each, the last one first.

Every group of channels has its own sums of dB and dC, which are added up after each launch: only one segment's exist at
a time. All other results are written in place: the next launch goes on from the adjoint and the sums of the last one.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.coupled_scan.mosaic_gpu import backward, backward_tensor, blocks
from pallas_kernels.coupled_scan.mosaic_gpu.plan import F32, Plan

Arrays = dict[str, jax.Array]
SUMS = ("dA", "dgain", "dgain_parts", "dweights", "drows")


@functools.partial(jax.jit, static_argnames=("plan", "chunk"))
def run(plan: Plan, arrays: Arrays, chunk: int) -> Arrays:
    """All gradients.

    Args:
        plan: the plan.
        arrays: see `backward.run`.
        chunk: steps a chunk.

    Returns:
        What `backward.run` returns, with "dB" and "dC" [M, B, L', slabs, SLAB] in place of "dprojections".
    """
    segment = plan.segment_steps(chunk, plan.save)
    if segment == chunk:
        out = _kernel(plan).run(plan, arrays, chunk, chunk)
        return out | {name: _sum_groups(plan, out["dprojections"][:, k]) for k, name in enumerate(("dB", "dC"))}
    # A batch of problems is solved one by one: what is written in place has no axis for it.
    return jax.custom_batching.sequential_vmap(functools.partial(_run, plan, chunk, segment))(arrays)


def _kernel(plan: Plan) -> Any:
    return backward_tensor if plan.threads.tensor else backward


def _sum_groups(plan: Plan, parts: jax.Array) -> jax.Array:
    return jnp.sum(parts.astype(F32), axis=0).astype(plan.dtype)


def _run(plan: Plan, chunk: int, segment: int, arrays: Arrays) -> Arrays:
    """The segments of a chunk one after the other, those of all chunks at once."""
    kernel, count = _kernel(plan), -(-chunk // segment)
    shapes = backward.shapes(plan, chunk, segment, kernel.choose_tiling(plan))
    parts = shapes.pop("dprojections").shape
    chunks, split = arrays["adjoint"].shape[0], (plan.threads.lanes, plan.threads.rows)
    zeros = {name: jnp.zeros(v.shape, v.dtype) for name, v in shapes.items() if name in SUMS}
    empty = {name: lax.empty(v.shape, v.dtype) for name, v in shapes.items() if name not in SUMS}
    in_place = zeros | empty | {"dstate": arrays["adjoint"]}
    in_place = {name: blocks.reshape_states(values, name, split) for name, values in in_place.items()}
    whole = (*parts[2:4], chunks, chunk, *parts[5:])
    totals = {name: lax.empty(whole, plan.dtype) for name in ("dB", "dC")}
    inputs = {name: values for name, values in arrays.items() if name != "adjoint"}

    def all_segments(refs: dict[str, Any]) -> None:
        sums_of = [refs.pop(name) for name in totals]

        def one(walked: Any, _: None) -> None:
            out = kernel.run(plan, inputs | {"walked": jnp.full(1, walked, jnp.int32)}, chunk, segment, refs)
            for k, total in enumerate(sums_of):
                sums = _sum_groups(plan, out["dprojections"][:, k])
                sums = sums.reshape(*parts[2:4], chunks, segment, *parts[5:])
                # Rows before the last segment, if it is a shorter one, are overwritten by the next launch.
                start = jnp.minimum((count - 1 - walked) * segment, chunk - segment)
                total[:, :, :, pl.ds(start, segment)] = sums

        lax.fori_loop(0, count, one, None)

    out = pl.run_state(all_segments)(in_place | totals)
    for name in totals:
        out[name] = out[name].reshape(*parts[2:4], chunks * chunk, *parts[5:])
    return {name: values.reshape(shapes[name].shape) if name in shapes else values for name, values in out.items()}
