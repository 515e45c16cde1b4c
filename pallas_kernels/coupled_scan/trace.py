"""What happens inside a scan: the energy of the states, and where what a modality reads came from."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_kernels.coupled_scan import discretize
from pallas_kernels.coupled_scan.types import Array, Independent, Problem, Shared

_RECORD: contextvars.ContextVar[list[Problem] | None] = contextvars.ContextVar("record", default=None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trace:
    """The course of a scan, in the order of processing.

    Attributes:
        energy: mean square of the states h_t^m over channels and states, float32 [M, B, L].
        flow: root mean square over the channels of the part of C_t^m h_t^m that stems from the inputs u of modality
            j, float32 [M, M, B, L]: flow[m, j]; what is off the diagonal went through the coupling.
    """

    energy: Array
    flow: Array


@contextlib.contextmanager
def recording() -> Iterator[list[Problem]]:
    """Collects the problems of all scans that run inside, in order; under `jax.jit`, use them in the same trace."""
    problems: list[Problem] = []
    token = _RECORD.set(problems)
    try:
        yield problems
    finally:
        _RECORD.reset(token)


def record(problem: Problem) -> None:
    """Adds a problem to the innermost `recording`, if there is one."""
    if (problems := _RECORD.get()) is not None:
        problems.append(problem)


def trace(p: Problem) -> Trace:
    """Follows the recurrence of Eq. 5, 6 and 9 with the inputs of each modality apart.

    Given dt, A, B and the coupling, the states are linear in u, so they are a sum over the modalities j that the
    inputs came from: h^m = SUM_j h^{m,j}, each with the recurrence of h and the inputs of j alone.

    Args:
        p: a checked problem; the sequence starts with it, whatever its initial state.
    """
    m, b, _, d = p.x.shape
    n = p.A.shape[-1]
    own = jnp.eye(m)[:, :, None, None, None]  # [j, m, 1, 1, 1]
    lead = (m, 1) if isinstance(p.coupling, Shared) else (m, m)
    start = jnp.zeros((*lead, b, d, n), jnp.float32)

    def step(state: Array, now: tuple[Array | None, ...]) -> tuple[Array, tuple[Array, Array]]:
        x, dt, B, C, mask, reset = now
        x, B, C = (discretize.keep(mask, v) for v in (x, B, C))
        dt_bias = None if p.dt_bias is None else p.dt_bias[:, None, :]
        dt = discretize.step_size(dt, dt_bias, mask, softplus=p.dt_softplus)
        a = jnp.exp(dt[..., None] * p.A.astype(jnp.float32)[:, None])
        u = (dt * x.astype(jnp.float32))[..., None] * B.astype(jnp.float32)[:, :, None, :]
        entering = state if reset is None else jnp.where(reset[:, None, None], 0.0, state)
        if isinstance(p.coupling, Shared):
            h = a * jnp.exp(p.coupling.log_gain.astype(jnp.float32))[:, None, None, :] * entering + own * u
            after = jnp.sum(h, axis=1, keepdims=True)
        elif isinstance(p.coupling, Independent):
            after = h = a * entering + own * u
        else:
            mixed = jnp.einsum("mi,jibdn->jmbdn", p.coupling.weights.astype(jnp.float32), entering)
            after = h = a * mixed + own * u
        if mask is not None:
            after = jnp.where(jnp.any(mask, axis=0)[:, None, None], after, entering)
        read = h if p.readout == "per_modality" else jnp.broadcast_to(jnp.sum(h, axis=1, keepdims=True), h.shape)
        parts = jnp.einsum("mbn,jmbdn->mjbd", C.astype(jnp.float32), read)
        energy = jnp.mean(jnp.square(jnp.sum(h, axis=0)), axis=(-2, -1))
        return after, (energy, jnp.sqrt(jnp.mean(jnp.square(parts), axis=-1)))

    def over_time(values: Array | None, axis: int) -> Array | None:
        return None if values is None else jnp.moveaxis(values, axis, 0)

    inputs = (*(over_time(v, 2) for v in (p.x, p.dt, p.B, p.C, p.mask)), over_time(p.reset, 1))
    _, (energy, flow) = jax.lax.scan(step, start, inputs)
    return Trace(jnp.moveaxis(energy, 0, -1), jnp.moveaxis(flow, 0, -1))
