"""Filters against sorting, and the law of the draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_jax.priors import sampling

# Few distinct values, so that ties are common.
LOGITS = st.lists(st.sampled_from([-4.0, -1.5, -1.0, 0.0, 0.5, 2.0, 3.25]), min_size=8, max_size=8)
filter_k = jax.jit(lambda x, k: sampling.filter_logits(x, top_k=k))
filter_p = jax.jit(lambda x, p: sampling.filter_logits(x, top_p=p))
filter_both = jax.jit(lambda x, k, p: sampling.filter_logits(x, top_k=k, top_p=p))


def kept_by_k(row, k):
    """All that reach the k-th largest: ties with it are kept."""
    return row >= np.sort(row)[::-1][min(k, len(row)) - 1]


def kept_by_p(row, p):
    """The shortest head of the sorted row that holds p, and ties with its last one."""
    weights = np.exp(row - row.max(), where=np.isfinite(row), out=np.zeros(len(row)))
    weights /= weights.sum()
    order = np.argsort(-row, kind="stable")
    head = int(np.searchsorted(np.cumsum(weights[order]), p - 1e-9)) + 1
    return row >= row[order[min(head, len(row)) - 1]]


def assert_kept(filtered, row, kept):
    np.testing.assert_array_equal(filtered, np.where(kept, row, -np.inf))


@settings(deadline=None, max_examples=100)
@given(LOGITS, st.integers(1, 12))
def test_top_k_against_sorting(row, k):
    row = np.float32(row)
    assert_kept(filter_k(row[None], k)[0], row, kept_by_k(row, k))


@settings(deadline=None, max_examples=200)
@given(LOGITS, st.floats(0.02, 0.98))
def test_top_p_against_sorting(row, p):
    row = np.float32(row)
    weights = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
    heads = np.cumsum(np.sort(weights)[::-1])
    if np.abs(heads - p).min() < 1e-5:  # rounding decides
        return
    assert_kept(filter_p(row[None], p)[0], row, kept_by_p(row, p))


def test_rows_are_filtered_separately_and_all_values_are_ordered():
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.normal(0, 10, (6, 50)), -1e-30 * rng.random((1, 50)), 1e30 * rng.normal(size=(1, 50))])
    rows = rows.astype(np.float32)
    filtered = filter_k(rows, 7)
    for ours, row in zip(filtered, rows):
        assert_kept(ours, row, kept_by_k(row, 7))
    assert (np.isfinite(filtered).sum(1) == 7).all()


def test_ties_with_the_last_kept_token_are_kept():
    row = np.float32([1, 3, 3, 3, 0])
    assert np.isfinite(filter_k(row[None], 2)[0]).tolist() == [False, True, True, True, False]
    assert np.isfinite(filter_p(row[None], 0.4)[0]).tolist() == [False, True, True, True, False]


def test_ends_of_the_range():
    row = np.float32(np.random.default_rng(0).normal(size=(3, 9)))
    np.testing.assert_array_equal(filter_p(row, 1.0), row)
    np.testing.assert_array_equal(filter_k(row, 9), row)
    np.testing.assert_array_equal(filter_k(row, 1000), row)
    for one in (filter_k(row, 1), filter_p(row, 1e-6)):
        np.testing.assert_array_equal(np.isfinite(one), row == row.max(1, keepdims=True))
    np.testing.assert_array_equal(sampling.filter_logits(row), row)


def test_top_p_is_a_share_of_the_tokens_that_top_k_keeps():
    row = np.log(np.float32([0.4, 0.3, 0.2, 0.1]))
    # The share of the first token among the first two is 0.4 / 0.7 = 0.57.
    assert np.isfinite(filter_both(row[None], 2, 0.55)[0]).tolist() == [True, False, False, False]
    assert np.isfinite(filter_p(row[None], 0.55)[0]).tolist() == [True, True, False, False]


def test_temperature_zero_selects_the_largest_logit():
    logits = np.random.default_rng(0).normal(size=(64, 20)).astype(np.float32)
    tokens = sampling.draw(logits, jax.random.split(jax.random.key(0), 64), jnp.float32(0))
    assert tokens.dtype == jnp.int32
    np.testing.assert_array_equal(tokens, logits.argmax(1))


@pytest.mark.parametrize("vocab", [20, sampling.SMALL_VOCABULARY + 1])
def test_a_draw_depends_on_its_own_key_and_logits_only(vocab):
    logits = np.random.default_rng(0).normal(size=(16, vocab)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 16)
    tokens = np.asarray(sampling.draw(logits, keys, jnp.float32(1)))
    backwards = np.asarray(sampling.draw(logits[::-1], keys[::-1], jnp.float32(1)))
    np.testing.assert_array_equal(backwards[::-1], tokens)
    assert [int(sampling.draw(logits[i : i + 1], keys[i : i + 1], jnp.float32(1))[0]) for i in (0, 7)] == [
        tokens[0],
        tokens[7],
    ]


def test_draws_follow_the_distribution():
    wanted = np.array([0.5, 0.25, 0.15, 0.08, 0.02, 0.0])
    with np.errstate(divide="ignore"):
        logits = np.log(wanted).astype(np.float32)
    count = 8000
    tokens = sampling.draw(
        jnp.broadcast_to(logits, (count, 6)), jax.random.split(jax.random.key(3), count), jnp.float32(1)
    )
    found = np.bincount(tokens, minlength=6)
    assert found[5] == 0, "filtered tokens are never drawn"
    chi_square = (np.square(found - count * wanted)[:5] / (count * wanted[:5])).sum()
    assert chi_square < 18.5, found  # 4 degrees of freedom: exceeded once in a thousand


@pytest.mark.parametrize("vocab", [4096, 5000])
def test_half_of_a_large_vocabulary_filtered_out(vocab):
    """Sums over thousands of classes are rounded, but every draw is a class with weight."""
    logits = np.random.default_rng(0).normal(size=(256, 32, vocab)).astype(np.float32) * 4
    logits[..., 1::2] = -np.inf
    tokens = np.asarray(jax.jit(sampling.draw)(logits, jax.random.split(jax.random.key(0), 256), jnp.float32(1)))
    assert tokens.shape == (256, 32) and (tokens % 2 == 0).all() and tokens.min() >= 0 and tokens.max() < vocab
    weights = np.exp(logits.astype(np.float64)).reshape(-1, vocab)
    drawn = np.take_along_axis(weights / weights.sum(1, keepdims=True), tokens.reshape(-1, 1), 1)
    wanted = (np.square(weights).sum(1) / np.square(weights.sum(1))).mean()  # of a drawn class's probability
    assert abs(drawn.mean() - wanted) < 4 * drawn.std() / len(drawn) ** 0.5


# -- large vocabularies: first a block, then a class --------------------------------------------------------------


@pytest.mark.parametrize("vocab", [4097, 5000, 8192])
def test_both_methods_select_the_same_class_where_sums_are_exact(vocab):
    """Classes have weight 1 or 0, so that no sum is rounded; whole blocks have none."""
    rng = np.random.default_rng(vocab)
    kept = rng.random((40, vocab)) < 0.3
    kept[:, 128:512] = kept[:5, :300] = kept[5:20, -300:] = kept[10:20, :300] = False
    logits = jnp.asarray(np.where(kept, np.float32(3), -np.inf))
    uniform = np.concatenate([np.zeros(10), rng.random(20), np.full(10, 1 - 2.0**-24)]).astype(np.float32)
    by_blocks = jax.jit(lambda x, u: sampling._select_by_blocks(x, x.max(-1, keepdims=True), u))(logits, uniform)
    flat = jax.jit(lambda x, u: sampling._select(jnp.exp(x - x.max(-1, keepdims=True)), u))(logits, uniform)
    number = (uniform * kept.sum(1).astype(np.float32)).astype(int)  # of the kept class, from 0
    expected = [np.flatnonzero(row)[min(n, row.sum() - 1)] for row, n in zip(kept, number)]
    np.testing.assert_array_equal(by_blocks[:30], expected[:30])
    np.testing.assert_array_equal(by_blocks, flat)


def test_where_no_class_is_reached_the_largest_logit_is_selected():
    """Rounding can leave no class, as a random number of 1 does here. The last class has no weight."""
    logits = np.random.default_rng(0).normal(size=(6, 5120)).astype(np.float32)
    logits[:, -200:] = -np.inf
    found = jax.jit(sampling._draw_at)(logits, jnp.ones(6), jnp.float32(1))
    np.testing.assert_array_equal(found, logits.argmax(1))


def test_only_large_vocabularies_are_split_into_parts():
    """At most 2**25 logits are in memory."""
    seen = []

    def total(x, y):
        seen.append(x.shape[1])
        return x.sum(-1) + y, y

    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6, 5)), jnp.float32)
    y = jnp.arange(24.0).reshape(4, 6)
    for vocab, positions in ((4096, 6), (4097, 6), (2**21, 3), (2**22, 2), (2**40, 1)):
        ours = sampling.in_parts(total, vocab, x, y)
        np.testing.assert_allclose(ours[0], x.sum(-1) + y, rtol=1e-5)
        np.testing.assert_array_equal(ours[1], y)
        assert seen.pop() == positions
