"""Associative scan in time chunks, for every backend.

Time is cut into chunks. An outer `lax.scan` walks them in order and carries the state; inside a chunk the recurrence
is parallel in time (an associative scan; Full, whose elements would be M x M matrices, takes plain steps). The body is
rematerialised, so the backward pass keeps the state entering each chunk and the inputs, nothing of size L x D x N; the
recurrences have their own VJP (a scan backwards), because differentiating `jax.lax.associative_scan` keeps every level
of its tree.

Shared needs one chain only, that of H_t = SUM_m h_t^m: H_t = s_t H_{t-1} + v_t with s = SUM_m g^m a^m, v = SUM_m u^m,
and then h_t^m = g^m a_t^m H_{t-1} + u_t^m for all modalities at once.
"""

import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels.coupled_scan import discretize
from pallas_kernels.coupled_scan.types import Array, Independent, Problem, ScanOutput, Shared
from pallas_kernels.coupled_scan.varying import vary
from pallas_kernels.platform import default_platform

# Floats of one [T, M, B, D, N] array that still sit in a CPU's cache (`cmamba bench scan --variants xla:8 xla:32`).
CACHE_FLOATS = 2**19
# Accelerators want long chunks: every chunk is a round of kernel launches. Not tuned on hardware yet.
ACCELERATOR_CHUNK = 64


def chunk_length(problem: Problem, platform: str) -> int:
    """Steps a chunk, a divisor of L where there is one: padding costs a mask.

    On a CPU a chunk should stay in the cache. Everywhere it has to grow with sqrt(L / M), which balances the L / T
    states that are kept against the T x M states inside a chunk; memory then grows with sqrt(L).
    """
    m, b, length, d = problem.x.shape
    b = b if isinstance(b, int) else 1  # Symbolic while a model is exported.
    balanced = math.isqrt(length // (4 * m))
    fast = CACHE_FLOATS // (m * b * d * problem.A.shape[-1]) if platform == "cpu" else ACCELERATOR_CHUNK
    most = min(max(4, balanced, min(fast, 64)), length)
    return next((t for t in range(most, most // 2, -1) if length % t == 0), most)


def scan(problem: Problem, *, chunk: int | None = None) -> ScanOutput:
    """Solves the problem chunk by chunk.

    Args:
        problem: the checked arguments.
        chunk: most steps a chunk; None: `chunk_length`.

    Returns:
        y and the final state.
    """
    p = problem
    length = p.x.shape[2]
    chunk = chunk or chunk_length(p, default_platform())
    n_chunks = -(-length // chunk)
    steps = -(-length // n_chunks)
    padding = n_chunks * steps - length
    mask = p.mask
    if padding and mask is None:
        # Padded steps are steps at which nothing is observed: they leave the state alone.
        mask = jnp.ones(p.x.shape[:3], bool)

    def cut(values: Array | None, axis: int) -> Array | None:
        """Moves time to the front and cuts it: [n_chunks, steps, ...]."""
        if values is None:
            return None
        values = jnp.moveaxis(values, axis, 0)
        if padding:
            values = jnp.pad(values, [(0, padding)] + [(0, 0)] * (values.ndim - 1))
        return values.reshape(n_chunks, steps, *values.shape[1:])

    inputs = (*(cut(v, 2) for v in (p.x, p.dt, p.B, p.C, p.z, mask)), cut(p.reset, 1))
    state = jnp.zeros(p.state_shape, jnp.float32) if p.initial_state is None else p.initial_state
    p, inputs, state = vary((p, inputs, state))

    body = jax.checkpoint(functools.partial(_chunk, p), prevent_cse=False)
    state, y = jax.lax.scan(lambda h, now: body(h, *now), state, inputs)
    y = y.reshape(n_chunks * steps, *y.shape[2:])[:length]
    return ScanOutput(y=jnp.moveaxis(y, 0, 2), final_state=state)


def _chunk(
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
    """One chunk of T steps; x, dt, z: [T, M, B, D]; B, C: [T, M, B, N]; mask: [T, M, B]; reset: [T, B]."""
    x, B, C = (discretize.keep(mask, v) for v in (x, B, C))
    z = None if z is None else discretize.keep(mask, z)
    B, C = B.astype(jnp.float32), C.astype(jnp.float32)
    dt_bias = None if p.dt_bias is None else p.dt_bias[:, None, :]
    dt = discretize.step_size(dt, dt_bias, mask, softplus=p.dt_softplus)

    exponent = dt[..., None] * p.A.astype(jnp.float32)[:, None]  # [T, M, B, D, N]
    if isinstance(p.coupling, Shared):
        exponent = exponent + p.coupling.log_gain.astype(jnp.float32)[:, None, None, :]
    decay = jnp.exp(exponent)
    u = (dt * x.astype(jnp.float32))[..., None] * B[..., None, :]
    if reset is not None:
        decay = jnp.where(reset[:, None, :, None, None], 0.0, decay)

    if isinstance(p.coupling, Shared):
        through = _pass_through(mask, reset, x.shape[0])
        s = jnp.sum(decay, axis=1)
        if mask is not None:
            s = jnp.where(jnp.any(mask, axis=1)[:, :, None, None], s, through)
        total, final = _chain(s, jnp.sum(u, axis=1), state)
        if p.readout == "shared":
            read = jnp.broadcast_to(total[:, None], u.shape)
        else:
            before = jnp.concatenate([state[None], total[:-1]])
            read = decay * before[:, None] + u
    else:
        if isinstance(p.coupling, Independent):  # dt = 0 makes a = 1: masked steps pass the state through by themselves
            read, final = _chain(decay, u, state)
        else:
            weights = p.coupling.weights.astype(jnp.float32)
            through = _pass_through(mask, reset, x.shape[0])
            if mask is not None:
                decay = decay * jnp.any(mask, axis=1)[:, None, :, None, None]
            read, final = _mixed_chains(decay, weights, through[:, None], u, state)
        if p.readout == "shared":
            read = jnp.broadcast_to(jnp.sum(read, axis=1, keepdims=True), read.shape)
    y = jnp.sum(C[..., None, :] * read, axis=-1)
    D = None if p.D is None else p.D[:, None, :]
    return final, discretize.finish(y, x, D, z, mask)


def _pass_through(mask: Array | None, reset: Array | None, steps: int) -> Array:
    """1 where nothing is observed, so that gains and weights leave the state alone, and no reset empties it; else 0.

    Returns:
        float32 [T, B, 1, 1], or [T, 1, 1, 1] without masks.
    """
    if mask is None:
        return jnp.zeros((steps, 1, 1, 1), jnp.float32)
    idle = ~jnp.any(mask, axis=1)
    if reset is not None:
        idle = idle & ~reset
    return idle[:, :, None, None].astype(jnp.float32)


@jax.custom_vjp
def _chain(decay: Array, u: Array, state: Array) -> tuple[Array, Array]:
    """h_t = decay_t h_{t-1} + u_t over the leading axis, parallel in time; returns all h and the last one."""
    h = _prefix(decay, u.at[0].add(decay[0] * state))
    return h, h[-1]


def _prefix(decay: Array, u: Array, *, reverse: bool = False) -> Array:
    def combine(early: tuple[Array, Array], late: tuple[Array, Array]) -> tuple[Array, Array]:
        return early[0] * late[0], late[0] * early[1] + late[1]

    return jax.lax.associative_scan(combine, (decay, u), reverse=reverse)[1]


def _chain_forward(decay: Array, u: Array, state: Array) -> tuple[tuple[Array, Array], tuple[Array, Array, Array]]:
    h, final = _chain(decay, u, state)
    return (h, final), (decay, h, state)


def _chain_backward(saved: tuple[Array, Array, Array], cotangents: tuple[Array, Array]) -> tuple[Array, Array, Array]:
    decay, h, state = saved
    dh, dfinal = cotangents
    dh = dh.at[-1].add(dfinal)
    # The adjoint is the same recurrence backwards: g_t = dh_t + decay_{t+1} g_{t+1}.
    g = _prefix(jnp.concatenate([decay[1:], jnp.ones_like(decay[:1])]), dh, reverse=True)
    before = jnp.concatenate([state[None], h[:-1]])
    return g * before, g, decay[0] * g[0]


_chain.defvjp(_chain_forward, _chain_backward)


@jax.custom_vjp
def _mixed_chains(decay: Array, weights: Array, pass_through: Array, u: Array, state: Array) -> tuple[Array, Array]:
    """h_t^m = decay_t^m SUM_i W_{m,i} h_{t-1}^i + pass_through_t h_{t-1}^m + u_t^m; returns all h and the last one.

    One step after the other: the associative element would be an M x M matrix for each (d, n), M times the memory
    and M^2 times the products of a step at each of log2(T) levels.
    """

    def step(h: Array, now: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        decay, pass_through, u = now
        h = decay * _mix(weights, h) + pass_through * h + u
        return h, h

    final, h = jax.lax.scan(step, state, (decay, pass_through, u))
    return h, final


def _mix(weights: Array, h: Array) -> Array:
    return jnp.einsum("mi,...ibdn->...mbdn", weights, h, precision="highest")


def _mixed_chains_forward(decay: Array, weights: Array, pass_through: Array, u: Array, state: Array) -> tuple:
    h, final = _mixed_chains(decay, weights, pass_through, u, state)
    return (h, final), (decay, weights, pass_through, h, state)


def _mixed_chains_backward(saved: tuple, cotangents: tuple[Array, Array]) -> tuple:
    decay, weights, pass_through, h, state = saved
    dh, dfinal = cotangents

    def step(later: Array, now: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        decay, pass_through, dh = now
        g = dh + later
        return _mix(weights.T, decay * g) + pass_through * g, g

    dstate, g = jax.lax.scan(step, dfinal, (decay, pass_through, dh), reverse=True)
    before = jnp.concatenate([state[None], h[:-1]])
    dweights = jnp.einsum("tmbdn,tibdn->mi", decay * g, before, precision="highest")
    return g * _mix(weights, before), dweights, jnp.zeros_like(pass_through), g, dstate


_mixed_chains.defvjp(_mixed_chains_forward, _mixed_chains_backward)
