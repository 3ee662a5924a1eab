"""Attention patterns: masks against brute force from the paper's definitions, and fast paths against the masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.models.attention import xla
from dalle_jax.models.attention.patterns import (
    Bidirectional,
    Column,
    Convolutional,
    Full,
    Row,
    Toroidal,
    full_layers,
    group_mask,
    sparse_layers,
)
from dalle_jax.models.attention.xla import attend, attend_image, attend_reference, dropped
from dalle_jax.priors.condition import Text
from dalle_jax.token_layout import TokenLayout

CAUSAL = [Full(), Row(), Column(), *(Convolutional(k, wrap) for k in (1, 3, 5, 11) for wrap in (True, False))]
CAUSAL += [Toroidal(3), Toroidal(5)]
PATTERNS = [*CAUSAL, Bidirectional(), Bidirectional(text_reads_image=True)]
GRIDS = [(4, 4), (3, 5), (5, 3), (1, 6), (6, 1)]
KEY = jax.random.key(0)
every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=str)
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)


def layout_of(height, width, text=3):
    return TokenLayout(Text(9, text), image_vocab=9, height=height, width=width)


def readable(pattern, query, height, width):
    """Image positions that `query` attends to, by the paper's definition of each pattern."""
    row, column = query // width, query % width
    if isinstance(pattern, Full):
        return set(range(query + 1))
    if isinstance(pattern, Bidirectional):
        return set(range(height * width))
    if isinstance(pattern, Row):  # itself and the w positions before it
        return {query - back for back in range(width + 1) if query - back >= 0}
    if isinstance(pattern, Column):  # itself and the positions above it
        return {r * width + column for r in range(row + 1)}
    half, found = pattern.kernel // 2, set()
    if isinstance(pattern, Toroidal):
        around = [(row + r, column + c) for r in range(-half, half + 1) for c in range(-half, half + 1)]
        return {key for r, c in around if (key := r % height * width + c % width) <= query}
    for r in range(row - half, row + 1):
        for c in range(column - half, column + half + 1):
            inside = 0 <= c < width
            key = r * width + c  # a column outside the row continues in the previous or next row
            if r <= row and 0 <= key <= query and (inside or pattern.wrap) and (r >= 0 or pattern.wrap):
                found.add(key)
    return found


def brute_force(pattern, layout):
    t, mask = layout.prefix_length, np.zeros((layout.length, layout.length), bool)
    for query in range(t):
        mask[query, : t if isinstance(pattern, Bidirectional) else query + 1] = True
        mask[query, t:] = pattern == Bidirectional(text_reads_image=True)
    for query in range(layout.image_length):
        mask[t + query, :t] = True
        for key in readable(pattern, query, layout.height, layout.width):
            mask[t + query, t + key] = True
    return mask


# -- masks --------------------------------------------------------------------------------------------------------


@every_pattern
@pytest.mark.parametrize("grid", [*GRIDS, (32, 32)], ids=str)
def test_mask_is_the_definition(pattern, grid):
    layout = layout_of(*grid)
    mask = pattern.mask(layout)
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, brute_force(pattern, layout))


@pytest.mark.parametrize(
    "pattern, expected",
    [
        (Row(), [5, 6, 7, 8, 9]),
        (Column(), [1, 5, 9]),
        (Convolutional(3), [4, 5, 6, 8, 9]),
        (Full(), list(range(10))),
        # Token 9 is in column 1. The window of 5 reaches column -1, the last column of the previous row.
        (Convolutional(5), [*range(0, 4), *range(3, 8), 8, 9]),
        (Convolutional(5, wrap=False), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
    ],
    ids=str,
)
def test_token_9_of_the_papers_grid(pattern, expected):
    layout = layout_of(4, 4)
    row = pattern.mask(layout)[3 + 9]
    assert row[:3].all(), "an image token reads all text"
    assert (row[3:].nonzero()[0]).tolist() == sorted(set(expected))


def test_wrap_around_at_a_row_end():
    """Token 8 is the first of a row, so the window's left side is the end of the previous row."""
    layout = layout_of(4, 4)
    seen = lambda wrap: Convolutional(3, wrap).mask(layout)[3 + 8][3:].nonzero()[0].tolist()  # noqa: E731
    assert seen(True) == [3, 4, 5, 7, 8]
    assert seen(False) == [4, 5, 8]


def test_the_papers_layers():
    layers = sparse_layers(64)
    assert len(layers) == 64 and layers[-1] == Convolutional(11)
    for number, layer in enumerate(layers[:-1], start=1):
        assert layer == (Column() if (number - 2) % 4 == 0 else Row()), number
    assert sparse_layers(1, 3, False) == (Convolutional(3, wrap=False),)
    assert full_layers(2) == (Full(), Full())


@pytest.mark.parametrize("kernel", [0, -1, 4])
def test_kernels_are_odd(kernel):
    with pytest.raises(ValueError, match="kernel"):
        Convolutional(kernel)


# -- training: groups ---------------------------------------------------------------------------------------------


@every_pattern
@every_grid
def test_groups_cover_the_mask_exactly_once(pattern, grid):
    layout = layout_of(*grid)
    n, t = layout.image_length, layout.prefix_length
    queries, keys = pattern.groups(layout)
    inside = group_mask(pattern, layout)
    times = np.zeros((n, n), int)
    for group, query, key in np.argwhere(inside):
        times[queries[group, query], keys[group, key]] += 1
    np.testing.assert_array_equal(times, pattern.mask(layout)[t:, t:].astype(int))
    assert sorted(queries.ravel().tolist()) == list(range(n))


@pytest.mark.parametrize("pattern", [Full(), Row(), Column(), Convolutional(3), Convolutional(5)], ids=str)
@pytest.mark.parametrize("grid", [(4, 4), (3, 5)], ids=str)
def test_group_keys_follow_the_groups(pattern, grid):
    layout = layout_of(*grid)
    positions = jnp.arange(layout.image_length, dtype=jnp.float32).reshape(1, *grid, 1, 1)
    queries, keys = pattern.groups(layout)
    np.testing.assert_array_equal(pattern.group_queries(positions)[0, ..., 0, 0].reshape(queries.shape), queries)
    cut = pattern.group_keys(positions, layout)[0, ..., 0, 0]
    np.testing.assert_array_equal(np.where(keys < 0, 0, cut), np.maximum(keys, 0))
    restored = pattern.ungroup(pattern.group_queries(positions), layout)
    np.testing.assert_array_equal(restored, positions.reshape(1, -1, 1, 1))


@pytest.mark.parametrize("grid", [(3, 5), (5, 2)], ids=str)
def test_fast_attention_equals_the_reference_forward_and_backward(grid):
    layout = layout_of(*grid)
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, cotangent = (jax.random.normal(key, (2, layout.length, 2, 8)) for key in keys)
    q = 3 * q  # sharp softmax, so that each key matters

    @jax.jit
    def reference(mask):
        out, back = jax.vjp(lambda *x: attend_reference(*x, mask), q, k, v)
        return out, *back(cotangent)

    patterns = [Full(), Row(), Column(), Convolutional(3), Convolutional(3, wrap=False), Convolutional(11)]
    patterns += [Bidirectional()]

    @jax.jit
    def fast():
        results = []
        for pattern in patterns:
            out, back = jax.vjp(lambda *x, p=pattern: attend(*x, p, layout), q, k, v)
            results.append((out, *back(cotangent)))
        return results

    for pattern, ours in zip(patterns, fast()):
        for name, a, b in zip(("out", "dq", "dk", "dv"), ours, reference(pattern.mask(layout))):
            np.testing.assert_allclose(a, b, atol=2e-5, err_msg=f"{pattern} {name}")


def test_reference_is_a_softmax_over_unmasked_keys():
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 1, 4, 1, 6)).astype(np.float32)
    mask = np.tril(np.ones((4, 4), bool))
    mask[3, 1] = False
    ours = attend_reference(q, k, v, mask)[0, :, 0]
    for i in range(4):
        seen = mask[i].nonzero()[0]
        weights = np.exp(k[0, seen, 0] @ q[0, i, 0] / np.sqrt(6))
        np.testing.assert_allclose(ours[i], weights @ v[0, seen, 0] / weights.sum(), rtol=1e-5)


@pytest.mark.parametrize("pattern", [Bidirectional(), Column(), Convolutional(3)], ids=str)
def test_dropped_probabilities_are_zero_and_the_others_scaled(pattern):
    """With one-hot values, the output of attention is its probabilities."""
    layout, rate = layout_of(3, 4), 0.3
    shape = (128, layout.length, 2, layout.length)
    q, k = (jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0)))
    v = jnp.broadcast_to(jnp.eye(layout.length)[None, :, None], shape)
    drop = functools.partial(dropped, rate=rate, key=jax.random.key(1))
    exact = np.asarray(jax.jit(lambda *x: attend(*x, pattern, layout))(q, k, v))
    ours = np.asarray(jax.jit(lambda *x: attend(*x, pattern, layout, drop))(q, k, v))
    np.testing.assert_allclose(ours[ours != 0], exact[ours != 0] / (1 - rate), rtol=1e-4)
    lost, t = (exact != 0) & (ours == 0), layout.prefix_length
    for queries, keys in ((slice(0, t), slice(0, t)), (slice(t, None), slice(0, t)), (slice(t, None), slice(t, None))):
        seen = exact[:, queries, :, keys] != 0
        assert lost[:, queries, :, keys][seen].mean() == pytest.approx(rate, abs=0.05), (queries, keys)
    assert len(np.unique(lost[:, :, 0].reshape(128, -1), axis=0)) == 128, "examples differ"
    np.testing.assert_array_equal(lost[:, :, 0], lost[:, :, 1])


# -- memory -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_blocks(monkeypatch):
    """Lets at most 150 scores of a head be in memory."""
    monkeypatch.setattr(xla, "MOST_SCORES", 150)
    monkeypatch.setattr(xla, "_BLOCK_SCORES", 90)


@pytest.mark.parametrize("pattern", [Bidirectional(), Full()], ids=str)
def test_blocks_of_queries_equal_the_reference_forward_and_backward(small_blocks, pattern):
    """15 queries in blocks of 5, or of 4 with padding."""
    for layout in (layout_of(3, 5), layout_of(3, 5, 6)):
        q, k, v, cotangent = (jax.random.normal(key, (2, layout.length, 2, 8)) for key in jax.random.split(KEY, 4))
        mask = pattern.mask(layout)

        @jax.jit
        def both(layout=layout, mask=mask, given=(q, k, v), cotangent=cotangent):
            ways = (lambda *x: attend(*x, pattern, layout)), (lambda *x: attend_reference(*x, mask))
            return [(out, *back(cotangent)) for out, back in (jax.vjp(way, *given) for way in ways)]

        assert "while" in jax.jit(both).lower().as_text()
        for name, a, b in zip(("out", "dq", "dk", "dv"), *both()):
            np.testing.assert_allclose(a, b, atol=2e-5, err_msg=name)


def test_each_block_drops_other_probabilities(small_blocks):
    layout = layout_of(3, 5)
    drop = functools.partial(dropped, rate=0.5, key=KEY)
    shape = (1, layout.length, 1, layout.length)
    v = jnp.eye(layout.length)[None, :, None]
    out = jax.jit(lambda q: attend(q, q, v, Bidirectional(), layout, drop))(jnp.zeros(shape))[0, 3:, 0]
    assert len(np.unique(np.asarray(out[:, 3:] > 0), axis=0)) == layout.image_length


def test_memory_is_linear_in_the_tokens_of_a_large_grid():
    """64x64 tokens, forward and backward, by XLA's analysis. All scores would be 64 MiB for each head."""
    sizes = {}
    for side in (64, 96):
        layout = layout_of(side, side, 64)
        x = jax.ShapeDtypeStruct((1, layout.length, 4, 16), jnp.float32)
        loss = lambda *x, layout=layout: jnp.square(attend(*x, Bidirectional(), layout)).sum()
        program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile()
        sizes[side] = program.memory_analysis().temp_size_in_bytes / 2**20
    assert sizes[64] < 110 and sizes[96] < (96 / 64) ** 2 * sizes[64] * 1.2, sizes


def test_candidates_of_a_caption_share_its_keys_in_memory():
    """64 candidates of one caption need no 64 copies of its keys and values, each 2 MiB."""
    layout = layout_of(2, 2, 2048)
    image = jax.ShapeDtypeStruct((64, 4, 4, 64), jnp.float32)
    text = jax.ShapeDtypeStruct((1, 2048, 4, 64), jnp.float32)
    draw = jax.jit(lambda *x: attend_image(*x, Bidirectional(), layout))
    program = draw.lower(image, image, image, text, text).compile()
    assert program.memory_analysis().temp_size_in_bytes < 64 * 2**20


# -- decoding: caches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern, slots",
    [(Row(), 33), (Convolutional(11), 5 * 32 + 5 + 1), (Convolutional(11, wrap=False), 166), (Full(), 1024)],
    ids=str,
)
def test_rings_are_as_large_as_the_pattern_reaches(pattern, slots):
    cache = pattern.cache(layout_of(32, 32)).init(2, 3, 8, jnp.bfloat16)
    assert cache.shape == (2, 3, slots, 8) and cache.dtype == jnp.bfloat16


def test_column_layers_read_one_column():
    store = Column().cache(layout_of(32, 16))
    cache = store.init(2, 3, 8, jnp.float32)
    assert cache.size == 2 * 3 * 8 * 32 * 16
    assert store.read(cache, jnp.int32(100)).shape == (2, 3, 32, 8)


def played_back(pattern, layout):
    """Returns for each position the cached positions that are visible to it, after writing 0…position."""
    store = pattern.cache(layout)

    @jax.jit
    def play():
        def step(cache, position):
            cache = store.write(cache, jnp.full((1, 1, 1), position, jnp.float32), position)
            return cache, (store.read(cache, position)[0, 0, :, 0], store.visible(position))

        # -1 marks unwritten slots, so that the test sees a slot that is read too early.
        empty = jnp.full_like(store.init(1, 1, 1, jnp.float32), -1)
        return jax.lax.scan(step, empty, jnp.arange(layout.image_length))[1]

    values, visible = jax.device_get(play())
    return [sorted(row[seen].astype(int).tolist()) for row, seen in zip(values, visible)]


CACHED = [(p, g) for p in CAUSAL for g in [(3, 5), (6, 1)]]
CACHED += [(p, (32, 32)) for p in (Row(), Column(), Convolutional(11))]


@pytest.mark.parametrize("pattern, grid", CACHED, ids=str)
def test_visible_cached_positions_are_the_masks_row(pattern, grid):
    layout = layout_of(*grid)
    t = layout.prefix_length
    image = pattern.mask(layout)[t:, t:]
    assert played_back(pattern, layout) == [row.nonzero()[0].tolist() for row in image]
