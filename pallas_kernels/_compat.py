"""Everything that differs between the supported JAX versions, and only that."""

import functools
import inspect
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu


@functools.cache
def _load_takes_index() -> bool:
    return inspect.signature(plgpu.load).parameters["idx"].default is inspect.Parameter.empty


def load(ref: Any, layout: Any) -> jax.Array:
    """`plgpu.load` of a whole reference (up to JAX 0.10 it wants an index)."""
    index = (...,) if _load_takes_index() else ()
    return plgpu.load(ref, *index, layout=layout, optimized=False)


def interpret_params() -> Any:
    """What `plgpu.kernel(interpret=...)` takes to run a kernel step by step on any device."""
    try:
        return plgpu.InterpretGPUParams()
    except AttributeError:  # up to JAX 0.10
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

        return InterpretGPUParams()
