"""Codebook usage and perplexity against brute force."""

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.metrics import codebook

count = jax.jit(codebook.count, static_argnums=1)
perplexity = jax.jit(codebook.perplexity)


def test_counts_skip_invalid_rows_and_add_up():
    tokens = np.random.default_rng(0).integers(0, 10, (6, 4, 4), np.int32)
    valid = np.array([True, True, False, True, False, True])
    expected = np.bincount(tokens[valid].ravel(), minlength=12)
    np.testing.assert_array_equal(count(tokens, 12, valid), expected)
    parts = count(tokens[:2], 12, valid[:2]) + count(tokens[2:], 12, valid[2:])
    np.testing.assert_array_equal(parts, expected)
    np.testing.assert_array_equal(count(tokens, 12), np.bincount(tokens.ravel(), minlength=12))


def test_perplexity_and_usage():
    counts = jnp.array([4.0, 4.0, 0.0, 8.0])
    p = np.array([0.25, 0.25, 0.5])
    np.testing.assert_allclose(perplexity(counts), np.exp(-(p * np.log(p)).sum()), rtol=1e-6)
    assert codebook.usage(counts) == 0.75


def test_extremes():
    np.testing.assert_allclose(perplexity(jnp.full((512,), 3.0)), 512, rtol=1e-5)
    np.testing.assert_allclose(perplexity(jnp.zeros(512).at[7].set(1e6)), 1.0, rtol=1e-6)
    assert perplexity(jnp.zeros(4)) == 1.0 and codebook.usage(jnp.zeros(4)) == 0.0
