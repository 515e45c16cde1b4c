import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Full, Independent, Shared, coupled_scan
from pallas_kernels.coupled_scan.trace import recording, trace
from pallas_kernels.coupled_scan.types import Problem

M, B, L, D, N = 3, 2, 6, 4, 5
COUPLINGS = {
    "independent": Independent(),
    "shared": Shared(jax.nn.log_softmax(jax.random.normal(jax.random.key(1), (M, N)), axis=0)),
    "full": Full(jax.nn.softmax(jax.random.normal(jax.random.key(2), (M, M)), axis=1)),
}


@pytest.fixture(params=COUPLINGS)
def problem(request):
    keys = iter(jax.random.split(jax.random.key(0), 9))

    def draw(*shape):
        return jax.random.normal(next(keys), shape)

    mask = jax.random.bernoulli(next(keys), 0.8, (M, B, L)).at[:, 0, 2].set(False)
    return Problem(
        x=draw(M, B, L, D),
        dt=draw(M, B, L, D),
        A=-jnp.exp(draw(M, D, N)),
        B=draw(M, B, L, N),
        C=draw(M, B, L, N),
        coupling=COUPLINGS[request.param],
        mask=mask,
        reset=jnp.zeros((B, L), bool).at[1, 3].set(True),
        readout="shared" if request.param == "full" else "per_modality",
    )


def run(p, **changes):
    p = dataclasses.replace(p, **changes)
    return coupled_scan(**{f.name: getattr(p, f.name) for f in dataclasses.fields(p)})


def until(p, end):
    """The first steps of the problem."""
    cut = {name: getattr(p, name)[:, :, :end] for name in ("x", "dt", "B", "C", "mask")}
    return dataclasses.replace(p, **cut, reset=p.reset[:, :end])


def test_energy_is_that_of_the_states(problem):
    if isinstance(problem.coupling, Shared):  # Its final state is the sum over the modalities.
        gain = jnp.array([0.5, 0.3, 0.2])
        shared = Shared(jnp.broadcast_to(jnp.log(gain)[:, None], (M, N)))
        found = trace(dataclasses.replace(problem, coupling=shared))
        problem = dataclasses.replace(problem, coupling=Full(jnp.broadcast_to(gain[:, None], (M, M))))
    else:
        found = trace(problem)
    for end in (3, L):
        energy = jnp.square(run(until(problem, end)).final_state).mean((-2, -1))
        observed = np.asarray(problem.mask[:, :, end - 1].any(0))
        np.testing.assert_allclose(found.energy[..., end - 1][:, observed], energy[:, observed], rtol=1e-4)


def test_what_stems_from_one_modality_is_what_it_alone_would_bring(problem):
    """Inputs x of the others set to zero leave dt, B and C as they are, so the rest is the part of that modality."""
    found = trace(problem)
    for j in range(M):
        alone = run(problem, x=problem.x * (jnp.arange(M) == j)[:, None, None, None]).y
        part = jnp.sqrt(jnp.mean(jnp.square(alone), axis=-1))
        np.testing.assert_allclose(found.flow[:, j] * problem.mask, part, rtol=1e-4, atol=1e-6)


def test_only_a_coupling_lets_anything_flow(problem):
    flow = np.array(trace(problem).flow)
    between = flow[~np.eye(M, dtype=bool)]
    assert (between[..., 1:] > 0).any() != isinstance(problem.coupling, Independent)
    assert (flow[np.eye(M, dtype=bool)] > 0).any()


def test_recording_collects_the_problems_in_order(problem):
    with recording() as problems:
        run(problem)
        with recording() as inner:
            run(problem, x=2 * problem.x)
        run(problem)
    run(problem)
    assert len(problems) == 2 and len(inner) == 1
    np.testing.assert_array_equal(inner[0].x, 2 * problem.x)
