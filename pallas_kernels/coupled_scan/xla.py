"""The scan in time chunks, for every backend.

Time is cut into chunks. An outer `lax.scan` walks them in order and carries the state. On accelerators a chunk is
parallel in time (an associative scan), on a CPU and for Full, whose elements would be M x M matrices, it is walked step
by step (`steps`). The body is rematerialised, so the backward pass keeps the state entering each chunk and the inputs,
nothing of size L x D x N; the recurrences have their own VJP (a scan backwards), because differentiating
`jax.lax.associative_scan` keeps every level of its tree.

Shared needs one chain only, that of H_t = SUM_m h_t^m: H_t = s_t H_{t-1} + v_t with s = SUM_m g^m a^m, v = SUM_m u^m,
and then h_t^m = g^m a_t^m H_{t-1} + u_t^m for all modalities at once.
"""

import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels.coupled_scan import discretize, steps
from pallas_kernels.coupled_scan.types import Array, Full, Independent, Problem, ScanOutput, Shared
from pallas_kernels.coupled_scan.varying import vary
from pallas_kernels.platform import default_platform

# Floats of the states of all steps, [L, B, D, N], up to which a CPU keeps them instead of computing them again.
KEPT_FLOATS = 2**24
# Accelerators want long chunks: every chunk is a round of kernel launches. But a few arrays [T, M, B, D, N] of that
# many floats (1 GiB) have to fit into memory.
ACCELERATOR_CHUNK = 64
ACCELERATOR_FLOATS = 2**28


def chunk_length(problem: Problem, *, by_step: bool) -> int:
    """Steps a chunk, a divisor of L where there is one: padding costs a mask.

    Args:
        problem: the checked arguments.
        by_step: whether a chunk is walked step by step. Then it is the whole sequence if the states of its steps may
            be kept; if not, sqrt(L) steps balance the states of a chunk's steps against those entering the chunks.
            Chunks that are parallel in time should grow with sqrt(L / M), as far as T x M states fit into memory.
    """
    m, _, length, _ = problem.x.shape

    def floats(*shape: int) -> int:
        # The batch is symbolic while a model is exported.
        return math.prod(size for size in shape if isinstance(size, int))

    if not by_step:
        fitting = ACCELERATOR_FLOATS // floats(*problem.x.shape[:2], *problem.A.shape[1:])
        most = min(max(4, min(max(math.isqrt(length // (4 * m)), ACCELERATOR_CHUNK), fitting)), length)
    elif length * floats(*problem.state_shape) <= KEPT_FLOATS:
        return length
    else:
        most = max(4, math.isqrt(length))
    return next((t for t in range(most, most // 2, -1) if length % t == 0), most)


def scan(problem: Problem, *, chunk: int | None = None, by_step: bool | None = None) -> ScanOutput:
    """Solves the problem chunk by chunk.

    Args:
        problem: the checked arguments.
        chunk: most steps a chunk; None: `chunk_length`.
        by_step: walk a chunk step by step instead of parallel in time; None: on a CPU. Full always is.

    Returns:
        y and the final state.
    """
    p = problem
    length = p.x.shape[2]
    by_step = isinstance(p.coupling, Full) or (default_platform() == "cpu" if by_step is None else by_step)
    chunk = chunk or chunk_length(p, by_step=by_step)
    n_chunks = -(-length // chunk)
    size = -(-length // n_chunks)
    padding = n_chunks * size - length
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
        return values.reshape(n_chunks, size, *values.shape[1:])

    inputs = (*(cut(v, 2) for v in (p.x, p.dt, p.B, p.C, p.z, mask)), cut(p.reset, 1))
    state = jnp.zeros(p.state_shape, jnp.float32) if p.initial_state is None else p.initial_state
    p, inputs, state = vary((p, inputs, state))

    if by_step:
        state = jnp.swapaxes(state, -1, -2)
    body = functools.partial(_chunk, p, by_step)
    if not by_step or n_chunks > 1:
        body = jax.checkpoint(body, prevent_cse=False)
    state, y = jax.lax.scan(lambda h, now: body(h, *now), state, inputs)
    y = y.reshape(n_chunks * size, *y.shape[2:])[:length]
    return ScanOutput(y=jnp.moveaxis(y, 0, 2), final_state=jnp.swapaxes(state, -1, -2) if by_step else state)


def _chunk(
    p: Problem,
    by_step: bool,
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

    final, y = (_by_step if by_step else _at_once)(p, state, x.astype(jnp.float32) * dt, dt, B, C, mask, reset)
    D = None if p.D is None else p.D[:, None, :]
    return final, discretize.finish(y, x, D, z, mask)


def _by_step(
    p: Problem, state: Array, u: Array, dt: Array, B: Array, C: Array, mask: Array | None, reset: Array | None
) -> tuple[Array, Array]:
    """A chunk step by step."""
    inputs = {"dt": dt, "u": u, "B": B, "C": C, "A": jnp.swapaxes(p.A.astype(jnp.float32), 1, 2)}
    if isinstance(p.coupling, Shared):
        inputs["log_gain"] = p.coupling.log_gain.astype(jnp.float32)
    if isinstance(p.coupling, Full):
        inputs["weights"] = p.coupling.weights.astype(jnp.float32)
    if mask is not None and not isinstance(p.coupling, Independent):  # there dt = 0 makes a = 1: the state stays
        inputs["idle"] = 1 - jnp.any(mask, axis=1).astype(jnp.float32)
    if reset is not None:
        inputs["kept"] = 1 - reset.astype(jnp.float32)
    y, final = steps.walk(p.readout, inputs, state)
    return final, y


def _at_once(
    p: Problem, state: Array, u: Array, dt: Array, B: Array, C: Array, mask: Array | None, reset: Array | None
) -> tuple[Array, Array]:
    """A chunk parallel in time, for Shared and Independent."""
    exponent = dt[..., None] * p.A.astype(jnp.float32)[:, None]  # [T, M, B, D, N]
    if isinstance(p.coupling, Shared):
        exponent = exponent + p.coupling.log_gain.astype(jnp.float32)[:, None, None, :]
    decay = jnp.exp(exponent)
    u = u[..., None] * B[..., None, :]
    if reset is not None:
        decay = jnp.where(reset[:, None, :, None, None], 0.0, decay)

    if isinstance(p.coupling, Shared):
        s = jnp.sum(decay, axis=1)
        if mask is not None:
            s = jnp.where(jnp.any(mask, axis=1)[:, :, None, None], s, _pass_through(mask, reset))
        total, final = _chain(s, jnp.sum(u, axis=1), state)
        if p.readout == "shared":
            read = jnp.broadcast_to(total[:, None], u.shape)
        else:
            before = jnp.concatenate([state[None], total[:-1]])
            read = decay * before[:, None] + u
    else:  # dt = 0 makes a = 1: masked steps pass the state through by themselves
        read, final = _chain(decay, u, state)
        if p.readout == "shared":
            read = jnp.broadcast_to(jnp.sum(read, axis=1, keepdims=True), read.shape)
    return final, jnp.sum(C[..., None, :] * read, axis=-1)


def _pass_through(mask: Array, reset: Array | None) -> Array:
    """1 where nothing is observed, so that gains leave the state alone, and no reset empties it; else 0.

    Returns:
        float32 [T, B, 1, 1].
    """
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
