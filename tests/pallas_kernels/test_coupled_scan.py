"""One suite for every implementation of the coupled scan, against a float64 numpy loop (oracle.py).

What `implementations()` lists takes part by itself. Kernels that a CPU can only interpret have test files of their
own, which call functions of this one.
"""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import pallas_kernels
from pallas_kernels import Full, Independent, Shared, coupled_scan, coupled_scan_step, implementations
from pallas_kernels.coupled_scan import api, xla
from pallas_kernels.coupled_scan.cases import Case, covering_cases, make_inputs

# Files of their own run the interpreted kernels: they take too long to compile for the whole suite.
KERNELS = ("mosaic_gpu", "mosaic_tpu", "triton")
RUNNERS = {
    name: functools.partial(coupled_scan, implementation=name) for name in implementations() if name not in KERNELS
}


def _xla_at_once(**arguments):
    """What `xla` does on accelerators."""
    entry = dataclasses.replace(implementations()["xla"], run=functools.partial(xla.scan, by_step=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "_IMPLEMENTATIONS", (entry,))
        return coupled_scan(**arguments, implementation="xla")


RUNNERS["xla at once"] = _xla_at_once
COUPLINGS = ["independent", "shared", "full"]
# Largest relative L2 error of (y and final state, gradients).
TOLERANCE = {"float32": (1e-5, 1e-4), "bfloat16": (1e-2, 2e-2)}
# A little of everything; several chunks long.
EVERYTHING = dict.fromkeys(("skip", "gate", "dt_bias", "mask", "reset", "initial_state"), True)
SMALL = Case(M=3, B=2, L=70, D=3, N=4, **EVERYTHING)
HALF = SMALL.L // 2


@pytest.fixture(params=list(RUNNERS))
def scan(request):
    """`coupled_scan` by one implementation, compiled: scan(inputs, **options) -> ScanOutput."""
    run = RUNNERS[request.param]
    return lambda inputs, **options: _scan(run, _static(options), inputs)


@pytest.fixture(params=list(RUNNERS))
def scan_and_vjp(request):
    """The scan with its gradients: scan_and_vjp(inputs, y_bar, final_bar, **options) -> (ScanOutput, gradients)."""
    run = RUNNERS[request.param]
    return lambda inputs, *bars, **options: _scan_and_vjp(run, _static(options), *_split(inputs), *bars)


def _static(options):
    """All options in one order, so that equal ones share a compilation."""
    return tuple(sorted((SMALL.options | options).items()))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scan(run, options, inputs):
    return run(**inputs, **dict(options))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scan_and_vjp(run, options, floats, switches, y_bar, final_bar):
    out, vjp = jax.vjp(lambda floats: run(**floats, **switches, **dict(options)), floats)
    return out, vjp(pallas_kernels.ScanOutput(y=y_bar, final_state=final_bar))[0]


def _split(inputs):
    """The differentiable inputs and the masks."""
    switches = {name: inputs[name] for name in ("mask", "reset") if name in inputs}
    return {name: value for name, value in inputs.items() if name not in switches}, switches


def _cotangents(case, seed=1):
    rng = np.random.default_rng(seed)
    state = (case.B, case.D, case.N) if case.coupling == "shared" else (case.M, case.B, case.D, case.N)
    y_bar = rng.standard_normal((case.M, case.B, case.L, case.D))
    return jnp.asarray(y_bar, case.dtype), jnp.asarray(rng.standard_normal(state), jnp.float32)


def _run_oracle(case, inputs):
    """The oracle on the inputs as they are after rounding to the case's dtype."""
    exact = {name: np.asarray(value) for name, value in inputs.items() if name != "coupling"}
    exact = {name: v if v.dtype == bool else v.astype(np.float64) for name, v in exact.items()}
    parameter = [np.asarray(v, np.float64) for v in jax.tree.leaves(inputs["coupling"])]
    return oracle.coupled_scan(
        **exact, kind=case.coupling, parameter=parameter[0] if parameter else None, **case.options
    )


def assert_close(actual, expected, tolerance, name=""):
    """Relative L2 error; zeros have to be met exactly."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, name
    error, size = np.linalg.norm(actual - expected), np.linalg.norm(expected)
    assert error <= tolerance * size, f"{name}: relative error {error / size if size else error:.2e} > {tolerance}"


def assert_outputs_close(actual, expected, tolerance=2e-6):
    assert_close(actual.y, expected.y, tolerance, "y")
    assert_close(actual.final_state, expected.final_state, tolerance, "final_state")


def _at(inputs, time):
    """The inputs at a step or a slice of time (axis 2, or 1 for reset)."""
    axes = {"x": 2, "dt": 2, "B": 2, "C": 2, "z": 2, "mask": 2, "reset": 1}
    return {k: v[(slice(None),) * axes[k] + (time,)] if k in axes else v for k, v in inputs.items()}


# ---------------------------------------------------------------------------------------------------------------
# Against the oracle


@pytest.mark.parametrize("case", covering_cases(), ids=str)
def test_forward_and_every_gradient(scan_and_vjp, case):
    inputs = make_inputs(case)
    y_bar, final_bar = _cotangents(case)
    out, gradients = scan_and_vjp(inputs, y_bar, final_bar, **case.options)
    y, final_state, vjp = _run_oracle(case, inputs)
    expected = vjp(np.asarray(y_bar, np.float64), np.asarray(final_bar, np.float64))

    assert out.y.dtype == case.dtype and out.final_state.dtype == jnp.float32
    forward, backward = TOLERANCE[case.dtype]
    assert_close(out.y, y, forward, "y")
    assert_close(out.final_state, final_state, forward, "final_state")
    gradients["parameter"] = next(iter(jax.tree.leaves(gradients.pop("coupling"))), None)
    for name, value in expected.items():
        assert_close(gradients[name], value, backward, f"gradient of {name}")
    for name in set(gradients) - {"parameter"}:
        assert gradients[name].dtype == inputs[name].dtype, f"gradient of {name}"


def test_one_modality_is_mamba(scan):
    """Every coupling of one modality, with gain and weight one, is the selective scan of Mamba (Gu and Dao 2023)."""
    case = Case(M=1, B=2, L=70, D=3, N=4, coupling="independent", skip=True, gate=True, dt_bias=True)
    inputs = make_inputs(case)
    x, delta, A, B, C, D, z, bias = (
        np.asarray(inputs[name][0], np.float64) for name in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")
    )
    delta = np.logaddexp(0, delta + bias)
    state, y = np.zeros((2, 3, 4)), np.zeros_like(x)
    for t in range(70):
        deltaA = np.exp(np.einsum("bd,dn->bdn", delta[:, t], A))
        deltaB_x = np.einsum("bd,bn,bd->bdn", delta[:, t], B[:, t], x[:, t])
        state = deltaA * state + deltaB_x
        y[:, t] = np.einsum("bdn,bn->bd", state, C[:, t])
    y = (y + x * D) * (z / (1 + np.exp(-z)))

    for coupling in (Independent(), Shared(jnp.zeros((1, 4))), Full(jnp.ones((1, 1)))):
        out = scan(inputs | {"coupling": coupling})
        assert_close(out.y[0], y, 1e-5)
        assert_close(out.final_state.reshape(state.shape), state, 1e-5)


# ---------------------------------------------------------------------------------------------------------------
# Time: chunks, steps, padding, resets, direction


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_scan_equals_two_scans_and_single_steps(scan, coupling, reverse):
    inputs = make_inputs(dataclasses.replace(SMALL, coupling=coupling))
    whole = scan(inputs, reverse=reverse)
    early, late = slice(None, HALF), slice(HALF, None)
    first = scan(_at(inputs, late if reverse else early), reverse=reverse)
    rest = _at(inputs, early if reverse else late) | {"initial_state": first.final_state}
    second = scan(rest, reverse=reverse)
    halves = (second, first) if reverse else (first, second)
    assert_close(jnp.concatenate([half.y for half in halves], axis=2), whole.y, 2e-6)
    assert_close(second.final_state, whole.final_state, 2e-6)

    state, y, step = inputs.pop("initial_state"), [None] * SMALL.L, jax.jit(coupled_scan_step)
    for t in range(SMALL.L)[:: -1 if reverse else 1]:
        out = step(state, **_at(inputs, t))
        state, y[t] = out.final_state, out.y
    assert_close(jnp.stack(y, axis=2), whole.y, 2e-6)
    assert_close(state, whole.final_state, 2e-6)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_causality(scan, coupling, reverse):
    """Outputs do not see the inputs of later steps (in reverse: of earlier ones), not even NaN."""
    inputs = make_inputs(dataclasses.replace(SMALL, coupling=coupling))
    t = 40
    unseen, seen = (slice(None, t), slice(t, None)) if reverse else (slice(t, None), slice(None, t))
    spoiled = {k: v.at[:, :, unseen].set(jnp.nan) for k, v in inputs.items() if k in ("x", "dt", "B", "C", "z")}
    actual, expected = scan(inputs | spoiled, reverse=reverse), scan(inputs, reverse=reverse)
    np.testing.assert_array_equal(actual.y[:, :, seen], expected.y[:, :, seen])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_masked_padding_changes_nothing(scan, coupling, reverse):
    inputs = make_inputs(dataclasses.replace(SMALL, coupling=coupling))
    padded = dict(inputs)
    for name in ("x", "dt", "B", "C", "z"):
        padded[name] = jnp.pad(inputs[name], ((0, 0), (0, 0), (0, 9), (0, 0)), constant_values=jnp.nan)
    padded["mask"] = jnp.pad(inputs["mask"], ((0, 0), (0, 0), (0, 9)))
    padded["reset"] = jnp.pad(inputs["reset"], ((0, 0), (0, 9)))
    actual, expected = scan(padded, reverse=reverse), scan(inputs, reverse=reverse)
    assert not jnp.any(actual.y[:, :, SMALL.L :])
    assert_outputs_close(dataclasses.replace(actual, y=actual.y[:, :, : SMALL.L]), expected)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_reset_starts_a_new_sequence(scan, coupling, reverse):
    """Two packed sequences equal two scans; the first processed step of the second carries the reset."""
    inputs = make_inputs(dataclasses.replace(SMALL, coupling=coupling))
    never = jnp.zeros((SMALL.B, SMALL.L), bool)
    packed = scan(inputs | {"reset": never.at[:, HALF - 1 if reverse else HALF].set(True)}, reverse=reverse)
    first, second = slice(None, HALF), slice(HALF, None)
    first, second = (second, first) if reverse else (first, second)
    inputs["reset"] = never
    before = scan(_at(inputs, first), reverse=reverse)
    zeros = jnp.zeros_like(inputs["initial_state"])
    after = scan(_at(inputs, second) | {"initial_state": zeros}, reverse=reverse)
    assert_close(packed.y[:, :, first], before.y, 2e-6)
    assert_close(packed.y[:, :, second], after.y, 2e-6)
    assert_close(packed.final_state, after.final_state, 2e-6)


# ---------------------------------------------------------------------------------------------------------------
# Masks


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_state_passes_untouched_where_every_modality_is_masked(scan_and_vjp, coupling):
    case = dataclasses.replace(SMALL, coupling=coupling)
    inputs = make_inputs(case)
    inputs |= {name: jnp.zeros_like(inputs[name]) for name in ("mask", "reset")}
    y_bar, final_bar = _cotangents(case)
    out, gradients = scan_and_vjp(inputs, y_bar, final_bar)
    assert not jnp.any(out.y)
    np.testing.assert_array_equal(out.final_state, inputs["initial_state"])
    np.testing.assert_array_equal(gradients.pop("initial_state"), final_bar)
    for leaf in jax.tree.leaves(gradients):
        assert not jnp.any(leaf)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_garbage_in_masked_places_leaks_nowhere(scan_and_vjp, coupling, garbage, dtype):
    case = dataclasses.replace(SMALL, coupling=coupling, dtype=dtype)
    inputs = make_inputs(case)
    bars = _cotangents(case)
    spoiled = {name: jnp.where(inputs["mask"][..., None], inputs[name], garbage) for name in ("x", "dt", "B", "C", "z")}
    assert not jnp.all(jnp.isfinite(spoiled["x"]))
    actual, expected = scan_and_vjp(inputs | spoiled, *bars), scan_and_vjp(inputs, *bars)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


# ---------------------------------------------------------------------------------------------------------------
# Modalities and stability


def test_full_with_identity_weights_is_independent(scan_and_vjp):
    case = dataclasses.replace(SMALL, coupling="independent")
    inputs = make_inputs(case)
    bars = _cotangents(case)
    expected, expected_gradients = scan_and_vjp(inputs, *bars)
    actual, gradients = scan_and_vjp(inputs | {"coupling": Full(jnp.eye(case.M))}, *bars)
    assert_outputs_close(actual, expected)
    for name in set(gradients) - {"coupling"}:
        assert_close(gradients[name], expected_gradients[name], 1e-5, name)


@pytest.mark.parametrize("readout", ["per_modality", "shared"])
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_permuting_the_modalities_permutes_the_outputs(scan, coupling, readout):
    inputs = make_inputs(dataclasses.replace(SMALL, coupling=coupling))
    order = np.array([2, 0, 1])
    permuted = {k: v[order] for k, v in inputs.items() if k not in ("coupling", "reset", "initial_state")}
    permuted |= {k: inputs[k] for k in ("reset", "initial_state")}
    permuted["coupling"] = {
        "independent": lambda c: c,
        "shared": lambda c: Shared(c.log_gain[order]),
        "full": lambda c: Full(c.weights[order][:, order]),
    }[coupling](inputs["coupling"])
    expected = scan(inputs, readout=readout)
    state = expected.final_state
    if coupling != "shared":
        permuted["initial_state"] = inputs["initial_state"][order]
        state = state[order]
    actual = scan(permuted, readout=readout)
    assert_outputs_close(actual, dataclasses.replace(expected, y=expected.y[order], final_state=state))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("coupling", ["shared", "full"])
def test_normalised_coupling_bounds_the_state_of_a_long_sequence(scan, coupling, dtype, request):
    """|H_t| <= |H_{t-1}| + SUM_m |u_t^m| (shared), max_m |h_t^m| <= max_m |h_{t-1}^m| + max_m |u_t^m| (full)."""
    slow = dtype == "bfloat16" and request.node.callspec.params["scan"] == "reference"  # minutes, step by step on a CPU
    length = 8192 if slow else 65_536
    case = Case(M=3, B=1, L=length, D=1, N=4, dtype=dtype, coupling=coupling, dt_softplus=False)
    inputs = make_inputs(case)
    # A slow decay; C = e_0 shows the first state in y.
    inputs["A"] = jnp.full_like(inputs["A"], -1e-3)
    inputs["C"] = jnp.zeros_like(inputs["C"]).at[..., 0].set(1)
    out = scan(inputs, dt_softplus=False)
    dt, x, B = (np.abs(np.asarray(inputs[name], np.float64))[:, 0] for name in ("dt", "x", "B"))
    h, final_state, u = np.asarray(out.y, np.float64)[:, 0, :, 0], np.abs(out.final_state), dt * x * B  # u: [M, L, N]
    assert np.all(np.isfinite(h))
    size, force = (np.abs(h.sum(0)), u.sum(0)) if coupling == "shared" else (np.abs(h).max(0), u.max(0))
    rounding = 4 * float(jnp.finfo(dtype).eps) * np.abs(h).max(0)  # of y, in the inputs' dtype
    assert np.all(size[1:] <= size[:-1] + force[1:, 0] + rounding[1:] + rounding[:-1])
    assert np.all(final_state <= force.sum(0) * (1 + 1e-3))

    if coupling == "shared" and dtype == "float32":  # the bound is the gain's doing: the literal g = 1 overflows
        assert not jnp.all(jnp.isfinite(scan(inputs | {"coupling": Shared(jnp.zeros((3, 4)))}, dt_softplus=False).y))


# ---------------------------------------------------------------------------------------------------------------
# The public functions


def test_gradient_of_jit_is_jit_of_gradient():
    inputs, bars = make_inputs(SMALL), _cotangents(SMALL)
    floats, switches = _split(inputs)
    out, vjp = jax.vjp(jax.jit(lambda floats: coupled_scan(**floats, **switches)), floats)
    actual = vjp(dataclasses.replace(out, y=bars[0], final_state=bars[1]))[0]
    expected = _scan_and_vjp(RUNNERS["xla"], _static({}), floats, switches, *bars)[1]
    jax.tree.map(lambda a, e: assert_close(a, e, 1e-5), actual, expected)


def test_the_chosen_implementation_is_listed_and_explained():
    case = Case(M=2, B=1, L=3, D=2, N=4)
    problem = api.Problem(**make_inputs(case))
    choice = pallas_kernels.choose_implementation(problem, "cpu")
    assert choice.name == "xla" and "cpu" in choice.reason
    for name, implementation in implementations().items():
        assert implementation.name == name and implementation.summary


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": jnp.ones((2, 1, 3))}, r"x: expected \[M, B, L, D\].*got \(2, 1, 3\)"),
        ({"x": jnp.ones((2, 1, 0, 2))}, r"x: expected \[M, B, L, D\] without empty axes, got \(2, 1, 0, 2\)"),
        ({"x": jnp.ones((2, 1, 3, 2), jnp.int32)}, "x: expected a floating dtype, got int32"),
        ({"dt": jnp.ones((2, 1, 4, 2))}, r"dt: expected shape \(2, 1, 3, 2\), got \(2, 1, 4, 2\); M=2, B=1, L=3, D=2"),
        ({"A": jnp.ones((2, 4))}, r"A: expected \[M, D, N\].*got \(2, 4\)"),
        ({"A": jnp.ones((2, 3, 4))}, r"A: expected shape \(2, 2, 4\), got \(2, 3, 4\)"),
        ({"B": jnp.ones((2, 1, 3, 5))}, r"B: expected shape \(2, 1, 3, 4\), got \(2, 1, 3, 5\)"),
        ({"C": jnp.ones((1, 1, 3, 4))}, r"C: expected shape \(2, 1, 3, 4\), got \(1, 1, 3, 4\)"),
        ({"D": jnp.ones(2)}, r"D: expected shape \(2, 2\), got \(2,\)"),
        ({"z": jnp.ones((2, 1, 3, 1))}, r"z: expected shape \(2, 1, 3, 2\), got \(2, 1, 3, 1\)"),
        ({"dt_bias": jnp.ones((2, 1, 1, 2))}, r"dt_bias: expected shape \(2, 2\), got \(2, 1, 1, 2\)"),
        ({"mask": jnp.ones((2, 3), bool)}, r"mask: expected shape \(2, 1, 3\), got \(2, 3\)"),
        ({"mask": jnp.ones((2, 1, 3))}, r"mask: expected bool .* got float32"),
        ({"reset": jnp.ones((2, 1, 3), bool)}, r"reset: expected shape \(1, 3\), got \(2, 1, 3\)"),
        ({"reset": jnp.ones((1, 3), jnp.int32)}, r"reset: expected bool .* got int32"),
        ({"initial_state": jnp.ones((2, 1, 2, 4))}, r"initial_state: expected shape \(1, 2, 4\), got \(2, 1, 2, 4\)"),
        ({"coupling": Shared(jnp.ones((2, 3)))}, r"coupling.log_gain: expected shape \(2, 4\), got \(2, 3\)"),
        ({"coupling": Full(jnp.ones((2, 3)))}, r"coupling.weights: expected shape \(2, 2\), got \(2, 3\)"),
        ({"coupling": "shared"}, "coupling: expected Independent, Shared or Full, got str"),
        ({"readout": "mean"}, "readout: expected 'per_modality' or 'shared', got 'mean'"),
    ],
)
def test_wrong_arguments_raise_one_clear_message(changes, message):
    inputs = make_inputs(Case(M=2, B=1, L=3, D=2, N=4))
    with pytest.raises(pallas_kernels.ScanInputError, match=message) as error:
        # Unwrapped: users do not run the tests' type checks, which would object first.
        inspect.unwrap(coupled_scan)(**inputs | changes)
    assert "\n" not in str(error.value)


def test_state_of_a_step_is_checked():
    inputs = _at(make_inputs(Case(M=2, B=1, L=3, D=2, N=4)), 0)
    with pytest.raises(pallas_kernels.ScanInputError, match=r"expected shape \(1, 2, 4\), got \(2, 1, 2, 4\)"):
        coupled_scan_step(jnp.zeros((2, 1, 2, 4)), **inputs)


def test_unknown_implementation_names_the_known_ones():
    inputs = make_inputs(Case(M=2, B=1, L=3, D=2, N=4))
    with pytest.raises(
        pallas_kernels.UnsupportedError, match="unknown scan implementation 'cuda'; known: reference, xla"
    ):
        coupled_scan(**inputs, implementation="cuda")


def test_unsupported_implementation_says_why_and_names_the_cure(monkeypatch):
    picky = dataclasses.replace(
        implementations()["xla"], name="picky", unsupported=lambda p, platform: f"no {platform}"
    )
    monkeypatch.setattr(api, "_IMPLEMENTATIONS", (picky,))
    inputs = make_inputs(Case(M=2, B=1, L=3, D=2, N=4))
    with pytest.raises(pallas_kernels.UnsupportedError, match="'picky' cannot be used here: no cpu; use .*'xla'"):
        coupled_scan(**inputs, implementation="picky")
