import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.coupled_scan.cases import BENCHMARKS, Case, covering_cases, make_inputs


def test_covering_cases_hold_every_pair_of_values():
    rows = [dataclasses.asdict(case) for case in covering_cases()]
    names = ["L", "N", "M", "coupling", "dtype", "readout", "mask", "reset", "reverse", "gate", "initial_state"]
    values = {name: {row[name] for row in rows} for name in names}
    assert values["L"] >= {1, 2, 31, 50, 257} and values["N"] == {4, 8, 16, 32, 64, 128}
    assert {1, 8} <= values["M"] and values["mask"] == {False, True}
    for first, second in itertools.combinations(names, 2):
        met = {(row[first], row[second]) for row in rows}
        assert met == set(itertools.product(values[first], values[second])), (first, second)


def test_cases_have_distinct_names_and_are_repeatable():
    cases = covering_cases()
    assert len({str(case) for case in cases}) == len(cases)
    assert covering_cases() == cases


@pytest.mark.parametrize("coupling", ["independent", "shared", "full"])
def test_inputs_are_those_of_a_mamba_block(coupling):
    flags = dict.fromkeys(("skip", "gate", "dt_bias", "mask", "reset", "initial_state"), True)
    case = Case(M=3, B=2, L=64, D=16, N=8, dtype="bfloat16", coupling=coupling, **flags)
    inputs = make_inputs(case)
    assert all(inputs[name].dtype == jnp.bfloat16 for name in ("x", "dt", "B", "C", "z"))
    assert all(inputs[name].dtype == jnp.float32 for name in ("A", "D", "dt_bias", "initial_state"))
    assert jnp.all(inputs["A"] < 0)
    step = jax.nn.softplus(inputs["dt"] + inputs["dt_bias"][:, None, None])
    assert 1e-3 < jnp.median(step) < 1e-1
    mask = inputs["mask"]
    assert jnp.any(~jnp.any(mask, axis=0)) and jnp.any(jnp.any(mask, axis=0) & ~jnp.all(mask, axis=0))
    assert not jnp.any(mask[:, -1, -case.L // 4 :]) and jnp.any(inputs["reset"])
    if coupling == "shared":
        np.testing.assert_allclose(jnp.exp(inputs["coupling"].log_gain).sum(0), 1, rtol=1e-5)
    if coupling == "full":
        np.testing.assert_allclose(inputs["coupling"].weights.sum(1), 1, rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, make_inputs(case), inputs)
    assert not jnp.array_equal(make_inputs(case, seed=1)["x"], inputs["x"])


@pytest.mark.parametrize("dt_bias", [False, True])
@pytest.mark.parametrize("dt_softplus", [False, True])
def test_step_sizes_are_positive_whatever_the_options(dt_bias, dt_softplus):
    inputs = make_inputs(Case(M=2, B=2, L=32, D=8, N=4, dt_bias=dt_bias, dt_softplus=dt_softplus))
    step = inputs["dt"] + (inputs["dt_bias"][:, None, None] if dt_bias else 0)
    step = jax.nn.softplus(step) if dt_softplus else step
    assert jnp.all(step > 0) and 1e-3 < jnp.median(step) < 1e-1


def test_benchmarks_are_the_documented_shapes():
    shapes = {name: (case.M, case.B, case.L, case.D, case.N) for name, case in BENCHMARKS.items()}
    assert shapes == {
        "cpu": (3, 4, 2048, 256, 16),
        "S1": (3, 1024, 50, 256, 64),
        "S2": (3, 16, 2048, 1024, 16),
        "S3": (3, 4, 4096, 1024, 16),
        "S4": (3, 1, 65536, 1024, 16),
    }
