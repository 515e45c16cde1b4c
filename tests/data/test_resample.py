"""Resampling: windows as the published code has them, masks by the real steps, nothing lost by frames."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cmamba_jax.config import ModelConfig
from cmamba_jax.data.resample import frame_slots, resample
from cmamba_jax.errors import UserError
from cmamba_jax.models.encoders import Encoder

SIZES = [(500, 50), (375, 50), (400, 39), (55, 39), (50, 50), (20, 50), (1, 3), (7, 1)]


def make(n_steps, width=3):
    return np.random.default_rng(n_steps).normal(size=(n_steps, width)).astype(np.float32)


@pytest.mark.parametrize(("n_steps", "length"), SIZES)
def test_means_are_those_of_the_published_windows(n_steps, length):
    values = make(n_steps)
    edges = np.linspace(0, n_steps, length + 1, dtype=np.uint16)
    expected = [values[a : max(b, a + 1)].mean(axis=0) for a, b in itertools.pairwise(edges)]
    out, mask = resample(values, length, "mean")
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    assert out.dtype == np.float32 and mask.all()


@pytest.mark.parametrize(("n_steps", "length"), SIZES)
@pytest.mark.parametrize("method", ["mean", "nearest", "frames"])
def test_padding_is_masked_and_never_read(n_steps, length, method):
    values = make(n_steps)
    for n_real in {0, 1, n_steps // 2, n_steps - 1, n_steps}:
        garbage = np.where((np.arange(n_steps) < n_real)[:, None], values, np.nan).astype(np.float32)
        out, mask = resample(garbage, length, method, n_real=n_real)
        assert np.isfinite(out).all() and not out[~mask].any()
        assert mask.any() == (n_real > 0) or method == "nearest"
        assert (np.diff(mask.astype(int)) <= 0).all(), "what is real comes first"
        np.testing.assert_array_equal(resample(values, length, method, n_real=n_real)[0], out)
        if n_real == n_steps:
            assert mask.all()


def test_a_window_that_is_real_in_part_has_the_mean_of_that_part():
    out, mask = resample(np.array([[1.0], [3.0], [5.0], [9.0], [9.0], [9.0]]), 2, "mean", n_real=4)
    np.testing.assert_array_equal(out, [[3], [9]])
    out, mask = resample(np.array([[1.0], [3.0], [5.0], [9.0], [9.0], [9.0]]), 2, "mean", n_real=2)
    np.testing.assert_array_equal(out, [[2], [0]])
    assert mask.tolist() == [True, False]


@pytest.mark.parametrize("method", ["mean", "nearest", "frames"])
def test_as_many_steps_stay_as_they_are(method):
    values = make(12)
    np.testing.assert_array_equal(resample(values, 12, method)[0], values)


@pytest.mark.parametrize(("n_steps", "length"), SIZES)
def test_nearest_is_the_step_at_the_middle(n_steps, length):
    steps = np.arange(n_steps, dtype=np.float32)[:, None]
    out = resample(steps, length, "nearest")[0][:, 0]
    middle = (np.arange(length) + 0.5) * n_steps / length
    assert (np.abs(out + 0.5 - middle) <= 0.5 + 1e-6).all()


@pytest.mark.parametrize(("n_steps", "length"), SIZES)
def test_frames_hold_every_step_in_its_order(n_steps, length):
    values = make(n_steps)
    out, _ = resample(values, length, "frames", slots=frame_slots(n_steps, length))
    assert out.shape == (length, frame_slots(n_steps, length) * 3)
    steps = out.reshape(-1, 3)
    changed = np.append(True, (np.diff(steps, axis=0) != 0).any(axis=1))
    np.testing.assert_array_equal(steps[changed], values)


@pytest.mark.parametrize(("encoder", "taps"), [("linear", 1), ("conv", 2)])
def test_an_encoder_of_frames_is_a_strided_convolution(encoder, taps):
    length, stride, width = 6, 4, 3
    config = ModelConfig(d_model=5, encoder=encoder, encoder_width=taps)
    model = Encoder(config, stride * width, rngs=nnx.Rngs(0))
    values = make(length * stride, width)
    frames = jnp.asarray(resample(values, length, "frames")[0])[None]
    out, _ = model(frames, mask=None, reset=None, window=model.init_state(1))
    kernel = model.kernel[...].reshape(taps * stride, width, 5)
    expected = jax.lax.conv_general_dilated(
        jnp.asarray(values)[None],
        kernel,
        window_strides=[stride],
        padding=[((taps - 1) * stride, 0)],
        dimension_numbers=("NWC", "WIO", "NWC"),
    )
    expected = expected + model.bias[...]
    np.testing.assert_allclose(out, jax.nn.silu(expected) if encoder == "conv" else expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((make(4), 0, "mean"), {}, "resampling 4 steps, 4 of them real, to 0"),
        ((make(4)[:0], 2, "mean"), {}, "at least one step"),
        ((make(4), 2, "mean"), {"n_real": 5}, "5 of them real"),
        ((make(9), 2, "frames"), {"slots": 3}, "needs 5 slots a window, got 3"),
    ],
)
def test_impossible_sizes(arguments, options, message):
    with pytest.raises(UserError, match=message):
        resample(*arguments, **options)
