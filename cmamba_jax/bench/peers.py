"""Scans of other projects, for `cmamba bench scan --device-table`: as many uncoupled scans as there are modalities.

They solve a smaller problem (no coupling), on the same sizes and dtypes, with skip, gate and bias.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.coupled_scan.cases import Case


def available() -> list[str]:
    """The peers that are installed: mamba_ssm (CUDA, through PyTorch), jax-linear-attention (Mosaic GPU)."""
    found = {"mamba_ssm": ("selective_scan_cuda", "torch"), "jax-linear-attention": ("jla",)}
    return [name for name, needs in found.items() if all(importlib.util.find_spec(n) for n in needs)]


def mamba_ssm(case: Case) -> dict[str, Callable[[int], None]]:
    """`forward` and `forward_backward` of mamba_ssm's CUDA kernel.

    Args:
        case: sizes.

    Returns:
        Functions of the number of calls; they wait for the last one.
    """
    torch = importlib.import_module("torch")  # first: it loads the libraries that the extension needs

    selective_scan_cuda = importlib.import_module("selective_scan_cuda")

    torch.manual_seed(0)

    def normal(*shape: int, dtype: Any = torch.bfloat16) -> Any:
        return torch.randn(*shape, device="cuda").to(dtype)

    m, b, length, d, n = case.M, case.B, case.L, case.D, case.N
    large = [[normal(b, d, length) for _ in range(m)] for _ in range(4)]
    small = [[normal(b, 1, n, length) for _ in range(m)] for _ in range(2)]
    A = -torch.arange(1.0, n + 1, device="cuda").repeat(d, 1)
    D, bias = (normal(d, dtype=torch.float32) for _ in range(2))

    u, dt, z, dy = large
    B, C = small

    def forward(calls: int) -> None:
        for _ in range(calls):
            for i in range(m):
                selective_scan_cuda.fwd(u[i], dt[i], A, B[i], C[i], D, z[i], bias, True)
        torch.cuda.synchronize()

    def forward_backward(calls: int) -> None:
        for _ in range(calls):
            for i in range(m):
                out, x, *_ = selective_scan_cuda.fwd(u[i], dt[i], A, B[i], C[i], D, z[i], bias, True)
                dz = torch.empty_like(z[i])
                selective_scan_cuda.bwd(u[i], dt[i], A, B[i], C[i], D, z[i], bias, dy[i], x, out, dz, True, False)
        torch.cuda.synchronize()

    return {"forward": forward, "forward_backward": forward_backward}


def jax_linear_attention(case: Case) -> dict[str, Callable[[int], None]]:
    """`forward` and `forward_backward` of jax-linear-attention's mamba1.

    Args:
        case: sizes.

    Returns:
        Functions of the number of calls; they wait for the last one.
    """
    mamba1 = importlib.import_module("jla.ops.mosaic_gpu.mamba1").mamba1
    keys = iter(jax.random.split(jax.random.key(0), 16))

    def normal(*shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
        return jax.random.normal(next(keys), shape, dtype)

    m, b, length, d, n = case.M, case.B, case.L, case.D, case.N
    large = tuple(normal(m, b, length, d) for _ in range(3))
    small = tuple(normal(m, b, length, n) for _ in range(2))
    fixed = (-jnp.tile(jnp.arange(1.0, n + 1), (d, 1)), normal(d, dtype=jnp.float32), normal(d, dtype=jnp.float32))
    dy = normal(m, b, length, d)

    def scan(large: Any, small: Any, fixed: Any) -> list[jax.Array]:
        (x, dt, z), (B, C), (A, D, bias) = large, small, fixed
        return [mamba1(C[i], B[i], x[i], dt[i], A, d=D, z=z[i], dt_bias=bias, dt_softplus=True)[0] for i in range(m)]

    @jax.jit
    def both(large: Any, small: Any, fixed: Any) -> Any:
        out, vjp = jax.vjp(scan, large, small, fixed)
        return out, vjp([dy[i] for i in range(m)])

    arguments = (large, small, fixed)
    forward = jax.jit(scan)
    return {"forward": repeated(forward, *arguments), "forward_backward": repeated(both, *arguments)}


def repeated(function: Callable[..., Any], *arguments: Any) -> Callable[[int], None]:
    """A function of the number of calls of a compiled function, all issued before it waits for the last one."""

    def run(calls: int) -> None:
        for _ in range(calls):
            out = function(*arguments)
        jax.block_until_ready(out)

    return run


RUNNERS = {"mamba_ssm": mamba_ssm, "jax-linear-attention": jax_linear_attention}
