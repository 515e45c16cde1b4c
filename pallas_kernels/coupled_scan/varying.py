"""Types of values inside `jax.shard_map`: over which axes of the mesh they differ from device to device."""

from collections.abc import Iterable
from typing import Any

import jax


def varying_axes(tree: Any) -> frozenset[str]:
    """The manual mesh axes over which any array of `tree` varies; empty outside of shard_map."""
    return frozenset().union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(tree)))


def vary(tree: Any, axes: Iterable[str] = ()) -> Any:
    """Makes all arrays of `tree` vary over the same axes: those over which any of them varies, and `axes`.

    Parameters are the same on all devices, but their gradients there are not: JAX sums them over the devices where a
    parameter is made to vary, which has to happen outside of a derivative rule of one's own.
    """
    axes = varying_axes(tree) | frozenset(axes)

    def one(leaf: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - jax.typeof(leaf).manual_axis_type.varying))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(one, tree)
