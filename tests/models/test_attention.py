import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cmamba_jax.config import ModelConfig
from cmamba_jax.models import attention
from cmamba_jax.models.attention import CrossAttentionBlock, EarlyFusion, attend, positions


def test_attention_equals_a_loop_over_pairs_heads_and_steps():
    config = ModelConfig(d_model=4, n_heads=2, expand=1)
    block = CrossAttentionBlock(config, 2, rngs=nnx.Rngs(0))
    block.down[...] = jnp.zeros_like(block.down[...])  # Leaves the attention alone.
    x = np.asarray(jax.random.normal(jax.random.key(0), (2, 1, 3, 4)))
    mask = np.array([[[True, True, True]], [[True, False, True]]])
    x = x * mask[..., None]
    out, state = block(jnp.asarray(x), mask=jnp.asarray(mask), reset=None, state={}, key=None)

    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    query, key_value, last = (np.asarray(p[...]) for p in (block.query, block.key_value, block.out))
    expected = x.copy()
    for m, i, head, t in np.ndindex(2, 2, 2, 3):
        seen = [s for s in range(t + 1) if mask[i, 0, s]]
        if not mask[m, 0, t] or not seen:
            continue
        part = slice(2 * head, 2 * head + 2)
        q = (normed[m, 0, t] @ query[m, i])[part]
        k, v = np.split(normed[i, 0, seen] @ key_value[m, i], 2, axis=-1)
        weights = np.exp(k[:, part] @ q / np.sqrt(2))
        expected[m, 0, t] += (weights / weights.sum()) @ v[:, part] @ last[m, i, part]
    np.testing.assert_allclose(out, expected, atol=1e-5)
    assert state == {}


@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
def test_without_masks_it_is_the_attention_with_masks_that_hide_nothing(direction):
    block = CrossAttentionBlock(ModelConfig(d_model=4, n_heads=2, direction=direction), 2, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 2, 5, 4))
    masked, plain = (
        block(x, mask=mask, reset=None, state={}, key=None)[0] for mask in (jnp.ones((2, 2, 5), bool), None)
    )
    np.testing.assert_allclose(plain, masked, atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_flash_attention_gets_widths_of_whole_eights_and_the_true_scale(monkeypatch, causal):
    calls, plain = [], jax.nn.dot_product_attention

    def cudnn(query, key, value, *, implementation, **rest):
        calls.append((implementation, query.shape[-1]))
        return plain(query, key, value, **rest)

    query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 5, 2, 11), jnp.bfloat16)
    expected = attend(query, key, value, causal=causal)
    monkeypatch.setattr(attention, "_has_flash_attention", lambda: True)
    monkeypatch.setattr(jax.nn, "dot_product_attention", cudnn)
    out = attend(query, key, value, causal=causal)
    assert calls == [("cudnn", 16)] and out.shape == query.shape
    np.testing.assert_allclose(out.astype(jnp.float32), expected.astype(jnp.float32), atol=0.02)


@pytest.mark.parametrize("width", [5, 6])
def test_positions_start_again_at_a_reset(width):
    reset = jnp.array([[False, False, True, False]])
    plain, packed = positions(4, width, None), positions(4, width, reset)
    assert packed.shape == (1, 4, width)
    np.testing.assert_allclose(packed[0, 2:], plain[0, :2])
    assert len(np.unique(np.round(plain[0], 6), axis=0)) == 4


def test_the_average_counts_present_modalities_only():
    join = EarlyFusion(ModelConfig(d_model=2, early_fusion="average"), 2, rngs=nnx.Rngs(0))
    x = jnp.array([[[[1.0, 2.0], [3.0, 4.0]]], [[[5.0, 6.0], [0.0, 0.0]]]])
    out, seen = join(x, mask=jnp.array([[[True, True]], [[True, False]]]))
    np.testing.assert_allclose(out[0, 0], [[3, 4], [3, 4]])
    assert seen.shape == (1, 1, 2) and seen.all()
