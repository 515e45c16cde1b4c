"""The slow, obvious version: one step at a time, differentiated by JAX. Never changed for speed."""

import jax
import jax.numpy as jnp

from pallas_kernels.coupled_scan import discretize
from pallas_kernels.coupled_scan.types import Array, Independent, Problem, ScanOutput, Shared
from pallas_kernels.coupled_scan.varying import vary


def scan(problem: Problem) -> ScanOutput:
    """Solves the problem with `jax.lax.scan` over time."""
    p = problem
    state = jnp.zeros(p.state_shape, jnp.float32) if p.initial_state is None else p.initial_state

    def over_time(values: Array | None, axis: int) -> Array | None:
        return None if values is None else jnp.moveaxis(values, axis, 0)

    inputs = (
        *(over_time(v, 2) for v in (p.x, p.dt, p.B, p.C, p.z, p.mask)),
        over_time(p.reset, 1),
    )
    p, inputs, state = vary((p, inputs, state))
    state, y = jax.lax.scan(lambda h, now: step(p, h, *now), state, inputs)
    return ScanOutput(y=jnp.moveaxis(y, 0, 2), final_state=state)


def step(
    p: Problem,
    state: Array,
    x: Array,
    dt: Array,
    B: Array,
    C: Array,
    z: Array | None,
    mask: Array | None,
    reset: Array | None,
) -> tuple[Array, Array]:
    """Advances one step (Eq. 5, 6 and 9); x, dt, z: [M, B, D]; B, C: [M, B, N]; mask: [M, B]; reset: [B].

    Returns:
        The state after the step and y [M, B, D].
    """
    x, B, C = (discretize.keep(mask, v) for v in (x, B, C))
    z = None if z is None else discretize.keep(mask, z)
    dt_bias = None if p.dt_bias is None else p.dt_bias[:, None, :]
    dt = discretize.step_size(dt, dt_bias, mask, softplus=p.dt_softplus)

    a = jnp.exp(dt[..., None] * p.A.astype(jnp.float32)[:, None])  # [M, B, D, N]
    u = (dt * x.astype(jnp.float32))[..., None] * B.astype(jnp.float32)[:, :, None, :]

    entering = state
    if reset is not None:
        entering = jnp.where(reset[:, None, None], 0.0, entering)
    if isinstance(p.coupling, Shared):
        gain = jnp.exp(p.coupling.log_gain.astype(jnp.float32))[:, None, None, :]
        h = a * gain * entering + u
        after = jnp.sum(h, axis=0)
    elif isinstance(p.coupling, Independent):
        after = h = a * entering + u
    else:
        mixed = jnp.einsum("mi,ibdn->mbdn", p.coupling.weights.astype(jnp.float32), entering, precision="highest")
        after = h = a * mixed + u
    if mask is not None:
        # Nothing is observed at this step: the state passes through, untouched by gains and weights.
        after = jnp.where(jnp.any(mask, axis=0)[:, None, None], after, entering)

    read = h if p.readout == "per_modality" else jnp.broadcast_to(jnp.sum(h, axis=0), h.shape)
    y = jnp.sum(C.astype(jnp.float32)[:, :, None, :] * read, axis=-1)
    D = None if p.D is None else p.D[:, None, :]
    return after, discretize.finish(y, x, D, z, mask)
