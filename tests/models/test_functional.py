import jax
import jax.numpy as jnp
import numpy as np

from cmamba_jax.models import functional


def test_linear_applies_each_modality_its_own_matrix():
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 3, 4, 5)), rng.normal(size=(2, 5, 6))
    got = functional.linear(jnp.float32(x), jnp.float32(kernel), jnp.dtype("float32"))
    np.testing.assert_allclose(got, np.stack([x[m] @ kernel[m] for m in range(2)]), rtol=1e-5, atol=1e-5)


def test_layer_norm_standardises_each_step():
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 64)) * 7 + 3
    out = functional.layer_norm(x, jnp.ones((2, 64)), jnp.zeros((2, 64)))
    np.testing.assert_allclose(out.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(out.std(-1), 1, atol=1e-3)


def depthwise_conv_numpy(x, kernel, bias):
    x, kernel, bias = (np.asarray(v) for v in (x, kernel, bias))
    m, b, length, d = x.shape
    taps = kernel.shape[1]
    out = np.zeros_like(x)
    for step in range(length):
        for k in range(taps):
            past = step - (taps - 1) + k
            if past >= 0:
                out[:, :, step] += kernel[:, None, k] * x[:, :, past]
    return out + bias[:, None, None]


def conv_inputs(length):
    rng = np.random.default_rng(1)
    return (jnp.float32(rng.normal(size=s)) for s in ((2, 3, length, 5), (2, 4, 5), (2, 5)))


def test_conv_equals_the_definition():
    x, kernel, bias = conv_inputs(9)
    out, window = functional.causal_depthwise_conv(x, kernel, bias, jnp.zeros((2, 3, 3, 5)), None)
    np.testing.assert_allclose(out, depthwise_conv_numpy(x, kernel, bias), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(window, x[:, :, -3:])


def test_conv_continues_from_its_window_even_one_shorter_than_the_taps():
    x, kernel, bias = conv_inputs(9)
    window = jnp.zeros((2, 3, 3, 5))
    whole, _ = functional.causal_depthwise_conv(x, kernel, bias, window, None)
    parts = []
    for start, stop in ((0, 2), (2, 3), (3, 9)):
        part, window = functional.causal_depthwise_conv(x[:, :, start:stop], kernel, bias, window, None)
        parts.append(part)
    np.testing.assert_allclose(jnp.concatenate(parts, 2), whole, rtol=1e-6, atol=1e-6)


def test_conv_does_not_reach_across_a_reset_in_a_part_or_between_parts():
    x, kernel, bias = conv_inputs(9)
    zeros = jnp.zeros((2, 3, 3, 5))
    reset = jnp.zeros((3, 9), bool).at[:, 6].set(True)
    first, _ = functional.causal_depthwise_conv(x[:, :, :6], kernel, bias, zeros, None)
    second, end = functional.causal_depthwise_conv(x[:, :, 6:], kernel, bias, zeros, None)
    packed, window = functional.causal_depthwise_conv(x, kernel, bias, zeros, reset)
    np.testing.assert_allclose(packed, jnp.concatenate([first, second], 2), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(window, end)

    # The reset is the last step of the first part: what came before must not reach the second part.
    out, window = functional.causal_depthwise_conv(x[:, :, :7], kernel, bias, zeros, reset[:, :7])
    rest, _ = functional.causal_depthwise_conv(x[:, :, 7:], kernel, bias, window, reset[:, 7:])
    np.testing.assert_allclose(jnp.concatenate([out, rest], 2), packed, rtol=1e-6, atol=1e-6)


def test_keep_stops_nan():
    x = jnp.array([[[1.0, jnp.nan], [2.0, 3.0]]])
    np.testing.assert_array_equal(functional.keep(x, jnp.array([[False, True]])), [[[0, 0], [2, 3]]])
