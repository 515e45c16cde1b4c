"""`jax.jit` for the package's own programs."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels.platform import default_platform

_WITHOUT_YNNPACK = {"xla_cpu_experimental_ynn_fusion_type": ""}
"""On CPUs XLA leaves sums to the library YNNPACK, which takes up to ten times as long over the axes that the backward
pass of the scan sums: 241 ms against 22 with jax 0.10.2, 33 against 21 with 0.11.2 (M 3, B 1, L 100, D 256, N 64)."""


def jit(function: Callable, **options: Any) -> Any:
    """`jax.jit`, on CPUs with the compiler options that suit the scan.

    Args:
        function: what to compile for the default device.
        **options: of `jax.jit`.
    """
    return jax.jit(function, compiler_options=_options() if default_platform() == "cpu" else None, **options)


@functools.cache
def _options() -> dict[str, str] | None:
    """The options, if this version of XLA knows them."""
    try:
        jax.jit(lambda: 0, compiler_options=_WITHOUT_YNNPACK).lower().compile()
    except jax.errors.JaxRuntimeError:
        return None
    return _WITHOUT_YNNPACK
