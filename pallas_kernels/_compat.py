"""Everything that differs between the supported JAX versions, and only that."""

import contextlib
import contextvars
import functools
import importlib.metadata
import inspect
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

_interpreted = contextvars.ContextVar("interpreted", default=False)


@contextlib.contextmanager
def interpreted(value: bool) -> Iterator[None]:
    """Whether the GPU kernel that is being traced will be interpreted."""
    token = _interpreted.set(value)
    try:
        yield
    finally:
        _interpreted.reset(token)


def is_interpreted() -> bool:
    """Whether the GPU kernel that is being traced will be interpreted."""
    return _interpreted.get()


@functools.cache
def _load_takes_index() -> bool:
    index = inspect.signature(plgpu.load).parameters.get("idx")
    return index is not None and index.default is inspect.Parameter.empty


def load(ref: Any, layout: Any) -> jax.Array:
    """`plgpu.load` of a whole reference: up to JAX 0.10 it wants an index, and the interpreter does not know it."""
    if _interpreted.get():
        return ref[...]
    index = (...,) if _load_takes_index() else ()
    return plgpu.load(ref, *index, layout=layout, optimized=False)


def store(ref: Any, values: jax.Array) -> None:
    """Writes a whole reference. From JAX 0.12 on, an assignment also insists on a way without bank conflicts."""
    if hasattr(plgpu, "store") and not _interpreted.get():
        plgpu.store(ref, values, optimized=False)
    else:
        ref[...] = values


def layout_cast(values: jax.Array, layout: Any) -> jax.Array:
    """`plgpu.layout_cast`, which the interpreter does not know up to JAX 0.10."""
    return values if _interpreted.get() else plgpu.layout_cast(values, layout)


def interpret_params() -> Any:
    """What `plgpu.kernel(interpret=...)` takes to run a kernel step by step on any device."""
    try:
        return plgpu.InterpretGPUParams()
    except AttributeError:  # up to JAX 0.10
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

        return InterpretGPUParams()


def kernel_in_place(
    body: Any,
    *,
    out_type: Any,
    scratch_types: dict[str, Any],
    grid: tuple[int, ...],
    grid_names: tuple[str, ...],
    compiler_params: Any,
    kernel_name: str,
    interpret: Any,
) -> Any:
    """`plgpu.kernel` for operands some of which are references; up to JAX 0.10 that takes arrays alone."""

    def scoped(*refs: Any) -> None:
        pl.run_scoped(functools.partial(body, *refs), collective_axes=(), **scratch_types)

    mesh = plgpu.Mesh(grid=grid, grid_names=grid_names)
    options = {} if interpret is None else {"interpret": interpret}
    return pl.kernel(scoped, out_type=out_type, mesh=mesh, compiler_params=compiler_params, name=kernel_name, **options)


def triton_call(*arrays: jax.Array, out: Any, **arguments: Any) -> Any:
    """`jax_triton.triton_call`, which takes `out_type` from 0.4 on (Python 3.12) and before that `out_shape`."""
    import jax_triton

    name = "out_type" if "out_type" in inspect.signature(jax_triton.triton_call).parameters else "out_shape"
    return jax_triton.triton_call(*arrays, **{name: out}, **arguments)


def triton_refusal() -> str | None:
    """Why the installed jax-triton does not work with the installed JAX, or None if it does."""
    found = importlib.metadata.version("jax-triton")
    if jax.__version_info__ >= (0, 12) and tuple(map(int, found.split(".")[:2])) <= (0, 4):
        return f"jax-triton {found} does not work with jax {jax.__version__}; it needs a newer one, or jax before 0.12"
    return None
