"""The oracle's hand-derived backward against complex-step derivatives of its forward, exact to rounding error."""

import itertools

import numpy as np
import oracle
import pytest

STEP = 1e-30  # of the complex step; there is no cancellation, so smaller is only better


def _problem(rng, kind, reverse, readout, everything):
    m, b, length, d, n = 3, 2, 6, 2, 3
    inputs = {
        "x": rng.normal(size=(m, b, length, d)),
        "dt": rng.normal(size=(m, b, length, d)) if everything else rng.uniform(0.1, 1, (m, b, length, d)),
        "A": -rng.uniform(0.2, 2, (m, d, n)),
        "B": rng.normal(size=(m, b, length, n)),
        "C": rng.normal(size=(m, b, length, n)),
    }
    if kind != "independent":
        inputs["parameter"] = rng.normal(size=(m, n if kind == "shared" else m))
    options = {"kind": kind, "reverse": reverse, "readout": readout, "dt_softplus": everything}
    if everything:
        inputs |= {"D": rng.normal(size=(m, d)), "dt_bias": rng.normal(size=(m, d))}
        inputs["z"] = rng.normal(size=(m, b, length, d))
        inputs["initial_state"] = rng.normal(size=(b, d, n) if kind == "shared" else (m, b, d, n))
        options["mask"] = rng.random((m, b, length)) < 0.6
        options["mask"][:, 0, 2] = False  # a step without any modality
        options["reset"] = np.array(
            [[False, False, True, False, False, False], [False, False, False, True, False, True]]
        )
    return inputs, options


@pytest.mark.parametrize(
    ("kind", "reverse", "readout", "everything"),
    list(
        itertools.product(["independent", "shared", "full"], [False, True], ["per_modality", "shared"], [False, True])
    ),
)
def test_backward_is_the_derivative_of_the_forward(kind, reverse, readout, everything):
    rng = np.random.default_rng(0)
    inputs, options = _problem(rng, kind, reverse, readout, everything)
    y, final_state, vjp = oracle.coupled_scan(**inputs, **options)
    y_bar, final_bar = rng.normal(size=y.shape), rng.normal(size=final_state.shape)
    gradients = vjp(y_bar, final_bar)

    assert gradients.keys() == inputs.keys()
    for name, value in inputs.items():
        direction = rng.normal(size=value.shape)
        moved = inputs | {name: value + 1j * STEP * direction}
        y, final_state, _ = oracle.coupled_scan(**moved, **options)
        derivative = (np.sum(y * y_bar) + np.sum(final_state * final_bar)).imag / STEP
        np.testing.assert_allclose(np.sum(gradients[name] * direction), derivative, rtol=1e-11, err_msg=name)


def test_forward_on_numbers_worked_out_by_hand():
    """Two modalities, two steps, every size else one: A = -ln 2 and dt = 1 make the decay 1/2."""
    ones = np.ones((2, 1, 2, 1))
    inputs = {
        "x": ones * np.array([1.0, 3.0]).reshape(2, 1, 1, 1),
        "dt": ones,
        "A": np.full((2, 1, 1), -np.log(2)),
        "B": ones,
        "C": ones,
        "dt_softplus": False,
    }
    # h_1 = (1, 3). independent: h_2 = h_1 / 2 + x. shared: H = 4, gains (1/4, 3/4). full: W h_1 = (2, 3).
    expected = {
        ("independent", None): [1.5, 4.5],
        ("shared", (0.25, 0.75)): [1.5, 4.5],
        ("full", ((0.5, 0.5), (0.0, 1.0))): [2.0, 4.5],
    }
    for (kind, parameter), h_2 in expected.items():
        if kind == "shared":
            parameter = np.log(np.array(parameter)).reshape(2, 1)
        elif kind == "full":
            parameter = np.array(parameter)
        y, final_state, _ = oracle.coupled_scan(**inputs, kind=kind, parameter=parameter)
        np.testing.assert_allclose(y[:, 0, 0, 0], [1, 3])
        np.testing.assert_allclose(y[:, 0, 1, 0], h_2)
        np.testing.assert_allclose(final_state.ravel(), [sum(h_2)] if kind == "shared" else h_2)
