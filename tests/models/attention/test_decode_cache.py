"""Caches that grow during decoding give the tokens of caches with all slots from the start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prior_cases import autoregressive, drawn, rows

from dalle_jax.models.attention import decode_cache
from dalle_jax.models.attention.decode_cache import ColumnCache, RingCache
from dalle_jax.models.attention.patterns import Full, Row
from dalle_jax.priors.condition import Text
from dalle_jax.token_layout import TokenLayout

TEXT = rows(2)[0]
PRIORS = {
    "full": autoregressive(attention="full"),
    "any order": autoregressive(attention="full", order="random", start_tokens=True),
    "sparse": autoregressive({"depth": 3}, kernel=7),  # row, column, and a window of all 12 tokens
}


@pytest.mark.parametrize("name", PRIORS)
def test_growing_caches_draw_the_same_tokens(name, monkeypatch):
    """12 tokens in stages of 3. A program with stages has no loop over caches of all slots before the last."""
    prior = PRIORS[name]
    params, keys = drawn(prior), jax.random.split(jax.random.key(1), 4)

    def tokens():
        jax.clear_caches()  # the constants are not part of the key of a compiled program
        draw = lambda params: prior.sample(params, TEXT, keys, guidance=1.0)
        return np.asarray(draw(params)), str(jax.make_jaxpr(draw)(params)).count("scan[")

    whole, loops = tokens()
    monkeypatch.setattr(decode_cache, "_SHORT", 8)
    in_stages, more = tokens()
    np.testing.assert_array_equal(in_stages, whole)
    assert more == loops + 3
    jax.clear_caches()


def slots_read(stores, positions):
    """Runs a loop that returns the number of slots of the first cache at each position, and its last slot written."""
    caches = [(store.init(1, 1, 2, "float32"),) * 2 for store in stores]

    def body(carry, position):
        state, caches = carry
        ones = jnp.ones((1, 1, 2))
        caches = [tuple(store.write(x, ones, position) for x in cache) for store, cache in zip(stores, caches)]
        return (state + 1, caches), jnp.int32(caches[0][0].shape[2])

    (state, caches), slots = decode_cache.scan_in_stages(body, (jnp.int32(0), caches), stores, positions)
    assert state == positions
    return np.asarray(slots), caches


def test_long_caches_of_all_positions_grow():
    layout = TokenLayout(Text(10, 4), image_vocab=16, height=20, width=20)
    stores = [Full().cache(layout), Row().cache(layout), ColumnCache(20, 20)]
    slots, caches = slots_read(stores, 399)
    np.testing.assert_array_equal(slots, 100 * (1 + np.arange(399) // 100))
    for store, cache in zip(stores, caches):
        assert cache[0].shape == store.init(1, 1, 2, "float32").shape
    assert np.asarray(caches[0][0][0, 0, :399] == 1).all() and not np.asarray(caches[0][0][0, 0, 399:]).any()


@pytest.mark.parametrize("stores, positions", [([RingCache(256, ())], 255), ([RingCache(300, ())], 1023)])
def test_short_caches_and_rings_have_all_slots_from_the_start(stores, positions):
    """A ring that is written again at its first slot cannot grow."""
    assert set(slots_read(stores, positions)[0]) == {stores[0].slots}
