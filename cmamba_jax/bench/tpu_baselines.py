"""The baselines of `cmamba bench tpu-static`: the forward scan of the `shared` coupling written the short way."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_TILE = 128


def loop(inputs: dict[str, Any], width: int) -> jax.Array:
    """A straightforward Pallas kernel: one step after the other, states [N, width] in VMEM.

    Step sizes are made a tile at a time before the loop; every step then reads its rows, turns its rows of B and C into
    columns, and sums over the states.

    Args:
        inputs: x, dt [M, B, L, D]; A [M, D, N]; B, C [M, B, L, N]; coupling. L is a multiple of 128. B and C are cast
            to float32 (a tax of rows of 16-bit values, which cannot be read one at a time).
        width: channels a block.

    Returns:
        SUM_n C h, [M, B, L, D].
    """
    x, A = inputs["x"], inputs["A"]
    m, b, length, d = x.shape
    n = A.shape[-1]
    rows = pl.BlockSpec((m, 1, _TILE, width), lambda b, g, i: (0, b, i, g))
    states = pl.BlockSpec((m, 1, _TILE, n), lambda b, g, i: (0, b, i, 0))

    def kernel(x, dt, B, C, A, gain, y, h, dts, us, ys):
        @pl.when(pl.program_id(2) == 0)
        def _() -> None:
            h[...] = jnp.zeros_like(h)

        for i in range(m):
            raw = dt[i, 0].astype(jnp.float32)
            dts[i] = jnp.maximum(raw, 0) + jnp.log1p(jnp.exp(-jnp.abs(raw)))
            us[i] = dts[i] * x[i, 0].astype(jnp.float32)

        def step(t: jax.Array, _: None) -> None:
            row = pl.ds(t, 1)
            total = jnp.zeros_like(h)
            for i in range(m):
                decay = jnp.exp(dts[i, row] * A[i]) * gain[i]
                after = decay * h[...] + us[i, row] * B[i, 0, row].reshape(n, 1)
                ys[i, row] = jnp.sum(after * C[i, 0, row].reshape(n, 1), axis=0, keepdims=True)
                total = total + after
            h[...] = total

        jax.lax.fori_loop(0, _TILE, step, None)
        for i in range(m):
            y[i, 0] = ys[i].astype(y.dtype)

    tile = pltpu.VMEM((m, _TILE, width), jnp.float32)
    return pl.pallas_call(
        kernel,
        grid=(b, d // width, length // _TILE),
        in_specs=[
            rows,
            rows,
            states,
            states,
            pl.BlockSpec((m, n, width), lambda b, g, i: (0, 0, g)),
            pl.BlockSpec((m, n, 1), lambda b, g, i: (0, 0, 0)),
        ],
        out_specs=rows,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_shapes=[pltpu.VMEM((n, width), jnp.float32), tile, tile, tile],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=48 * 2**20),
        name="plain_loop",
    )(
        x,
        inputs["dt"],
        inputs["B"].astype(jnp.float32),
        inputs["C"].astype(jnp.float32),
        A.swapaxes(1, 2),
        jnp.exp(inputs["coupling"].log_gain)[..., None],
    )


def associative(inputs: dict[str, Any]) -> jax.Array:
    """One `jax.lax.associative_scan` in plain XLA over arrays [B, L, D, N].

    Args:
        inputs: as for `loop`, any L.

    Returns:
        SUM_n C h, [M, B, L, D].
    """
    dt = jax.nn.softplus(inputs["dt"].astype(jnp.float32))
    B, C = (inputs[name].astype(jnp.float32) for name in ("B", "C"))
    gain = inputs["coupling"].log_gain[:, None, None, None]
    decay = jnp.exp(dt[..., None] * inputs["A"][:, None, None] + gain)
    u = (dt * inputs["x"].astype(jnp.float32))[..., None] * B[..., None, :]

    def combine(early: tuple[jax.Array, jax.Array], late: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return early[0] * late[0], late[0] * early[1] + late[1]

    total = jax.lax.associative_scan(combine, (decay.sum(0), u.sum(0)), axis=1)[1]
    before = jnp.pad(total[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0)))
    y = jnp.einsum("mbldn,mbln->mbld", decay * before + u, C)
    return y.astype(inputs["x"].dtype)
