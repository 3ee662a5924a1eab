"""Several tokens a step from an autoregressive prior: the counts, the draws, known tokens and keys."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prior_cases import LAYOUT, N, V, autoregressive, changed, params_of, rows

from dalle_jax.distributed.mesh import make_mesh
from dalle_jax.distributed.rows import over_rows
from dalle_jax.errors import ConfigError
from dalle_jax.priors import groups, orders, sampling
from dalle_jax.priors.condition import Text
from dalle_jax.priors.guidance import guide
from dalle_jax.token_layout import TokenLayout

PRIOR = autoregressive(attention="full", order="random")
STARTED = autoregressive({"scan": True, "depth": 3}, attention="full", order="random", start_tokens=True)
NEIGHBOURS = changed(PRIOR, neighbour_kernel=3)
DIAGONAL = changed(NEIGHBOURS, order="diagonal")
LARGE = TokenLayout(Text(10, 1), image_vocab=16, height=9, width=8)  # known tokens run in two parts


# -- counts -------------------------------------------------------------------------------------------------------


def sizes(steps, unknown):
    return np.diff(groups.drawn_before(steps, np.array(unknown, np.int32)), axis=-1)


@settings(max_examples=200, deadline=None, database=None)
@given(st.integers(1, 1100), st.lists(st.integers(0, 1100), min_size=1, max_size=5))
def test_every_token_is_drawn_once(steps, unknown):
    """The groups add up. Each step draws at least one token as long as one is left."""
    drawn = groups.drawn_before(steps, np.array(unknown, np.int32))
    assert drawn.shape == (len(unknown), steps + 1) and drawn.dtype == np.int32
    expected = np.minimum(unknown, steps) if steps > 1 else np.sign(unknown)
    assert (drawn[:, 0] == 0).all() and (drawn[:, -1] == unknown).all()
    np.testing.assert_array_equal((np.diff(drawn) > 0).sum(-1), expected)
    assert (np.diff(drawn) >= 0).all()


@pytest.mark.parametrize("steps", [1, 7, 333])
def test_a_device_counts_like_numpy(steps):
    """Exactly, up to the largest grid."""
    unknown = np.r_[np.arange(70), 1023:1026, 4096, 2**15].astype(np.int32)
    on_device = jax.jit(groups.drawn_before, static_argnums=0)(steps, unknown)
    np.testing.assert_array_equal(on_device, groups.drawn_before(steps, unknown))
    assert (on_device[:, -1] == unknown).all()


def test_groups_grow_as_a_cosine():
    assert sizes(16, [64])[0].tolist() == [1, 1, 1, 1, 3, 3, 4, 4, 5, 5, 5, 6, 6, 6, 6, 7]
    assert sizes(8, [64, 12, 3, 0]).tolist() == [
        [1, 3, 6, 8, 10, 11, 12, 13], [1, 1, 1, 1, 1, 2, 2, 3], [1, 1, 1, 0, 0, 0, 0, 0], [0] * 8,
    ]  # fmt: skip
    assert sizes(64, [64]).tolist() == [[1] * 64] and sizes(1, [64]).tolist() == [[64]]
    drawn = groups.drawn_before(20, np.array([4096], np.int32))[0]
    np.testing.assert_allclose(drawn / 4096, 1 - np.cos(np.pi / 2 * np.arange(21) / 20), atol=5e-4)


@pytest.mark.parametrize("steps", [1, 2, 8, 15, 16, 64, 70])
def test_every_group_fits_into_its_stretch(steps):
    """Also the group before it, whose tokens run through the model in the same step."""
    for numbers in (np.arange(65, dtype=np.int32), np.array([64], np.int32)):
        spans = groups.stretches(groups.drawn_before(steps, numbers))
        assert [t for first, end, _ in spans for t in range(first, end)] == list(range(steps))
        room = np.concatenate([[size] * (end - first) for first, end, size in spans])
        largest = sizes(steps, numbers).max(0)
        assert (largest <= room).all() and (largest[:-1] <= room[1:]).all()
        assert len(spans) <= 8 and room.sum() <= 2 * max(steps, largest.sum())


# -- draws --------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def forward(prior, params, text, tokens, cells):
    return prior.model.apply({"params": params}, text, tokens, cells=cells)[1]


CASES = {
    "random": (PRIOR, 5, dict(order="random"), False),
    "one step": (PRIOR, 1, dict(order="random"), False),
    "neighbours": (NEIGHBOURS, 5, dict(order="random"), False),
    "neighbours, known, guided": (changed(STARTED, neighbour_kernel=5), 4, dict(guidance=1.0), True),
    "start tokens, known, guided": (STARTED, 5, dict(order="random", guidance=1.0, top_p=0.8), True),
    "diagonal": (DIAGONAL, 4, dict(temperature=2.0), False),
    "diagonal, known": (DIAGONAL, 9, {}, True),
    "known, halton": (PRIOR, 3, dict(temperature=0.5, final_temperature=2.0), True),
}


@pytest.mark.parametrize("prior, steps, knobs, with_known", CASES.values(), ids=CASES.keys())
def test_a_group_is_drawn_given_all_earlier_groups(prior, steps, knobs, with_known):
    """Each token is drawn with the key of its place, as if its cell came next after the earlier groups."""
    text, given = rows(2)
    given, mask = np.tile(given, (2, 1)), np.random.default_rng(5).random((4, N)) < 0.4
    mask[1], mask[2] = False, True
    keys = jax.random.split(jax.random.key(0), 4)
    known = (given, mask) if with_known else None
    params = params_of(prior)
    tokens = np.asarray(prior.sample(params, text, keys, known=known, steps=steps, **knobs))
    assert tokens.shape == (4, N) and tokens.dtype == np.int32

    mask = mask if with_known else np.zeros_like(mask)
    order = "diagonal" if prior is DIAGONAL else knobs.get("order", "halton")
    visited = np.asarray(orders.cells(order, keys, LAYOUT))
    cells = np.asarray(orders.given_first(visited, mask))
    count = mask.sum(-1)
    if prior is DIAGONAL:  # the groups of the grid, without their known cells
        ends = orders.diagonal_groups(steps, LAYOUT)
        unknown = ~np.take_along_axis(mask, visited, axis=1)
        drawn = count[:, None] + np.stack([unknown[:, :end].sum(-1) for end in ends], axis=1)
    else:
        drawn = count[:, None] + groups.drawn_before(steps, (N - count).astype(np.int32))
    text = text.repeat(2, axis=0)
    expected = np.where(mask, given, 0)
    chosen = jax.jit(lambda logits, keys, progress: sampling.choose(
        logits, keys, sampling.knobs(LAYOUT, text, keys, sampling.SamplingOptions(**knobs)), progress
    ))  # fmt: skip
    for place in range(N):
        step = (drawn <= place).sum(-1) - 1  # of each row; -1 for a known token
        start = np.where(step < 0, place, drawn[np.arange(4), np.maximum(step, 0)])
        one = np.stack([np.r_[row[:s], row[place], row[s:place], row[place + 1 :]] for row, s in zip(cells, start)])
        in_order = np.take_along_axis(tokens, one, axis=1)
        logits = forward(prior, params, text, in_order, one)[np.arange(4), start]
        if "guidance" in knobs:
            null = np.tile(LAYOUT.condition.empty(), (4, 1))
            null = forward(prior, params, null, in_order, one)[np.arange(4), start]
            logits = guide(logits, null, knobs["guidance"])
        folded = jax.vmap(jax.random.fold_in, (0, None))(keys, place)
        for row in range(4):
            if step[row] >= 0:
                expected[row, cells[row, place]] = chosen(logits, folded, step[row] / max(steps - 1, 1))[row]
    np.testing.assert_array_equal(tokens, expected)
    assert len(np.unique(tokens)) > 3


@pytest.mark.parametrize("prior", [PRIOR, NEIGHBOURS], ids=["plain", "neighbours"])
@pytest.mark.parametrize(
    "order, knobs, with_known", [("raster", {}, False), ("random", {"guidance": 1.5, "top_k": 5}, True)]
)
def test_groups_of_one_token_are_one_token_after_another(order, knobs, with_known, prior):
    text, given = rows(2)
    known = (np.tile(given, (2, 1)), np.random.default_rng(3).random((4, N)) < 0.3) if with_known else None
    draw = functools.partial(
        prior.sample, params_of(prior), text, jax.random.split(jax.random.key(1), 4), known=known, order=order, **knobs
    )
    np.testing.assert_array_equal(draw(steps=N), draw())


@settings(max_examples=10, deadline=None, database=None)
@given(data=st.data())
@pytest.mark.parametrize(
    "dtype, steps, order", [("float32", 4, "halton"), ("bfloat16", 1, "raster"), ("float32", 3, "diagonal")]
)
def test_known_tokens_are_immutable(dtype, steps, order, data):
    prior = changed(PRIOR, {"dtype": dtype})
    text, tokens = rows(4)
    mask = np.random.default_rng(data.draw(st.integers(0, 99))).random((4, N)) < data.draw(st.floats(0, 1))
    mask[0], mask[1] = True, False
    keys = jax.random.split(jax.random.key(data.draw(st.integers(0, 99))), 4)
    out = np.asarray(prior.sample(params_of(prior), text, keys, known=(tokens, mask), steps=steps, order=order))
    np.testing.assert_array_equal(out[mask], tokens[mask])
    assert 0 <= out.min() and out.max() < V


def test_many_known_tokens_are_all_seen():
    """More than run through the model together: the drawn tokens are those of one token after another."""
    prior = autoregressive(attention="full", order="random")
    prior = type(prior)(LARGE, prior.options)
    text, given = rows(2, layout=LARGE)
    mask = np.random.default_rng(0).random(given.shape) < np.array([[0.95], [0.3]])
    draw = functools.partial(
        prior.sample, params_of(prior), text, jax.random.split(jax.random.key(0), 2), known=(given, mask)
    )
    np.testing.assert_array_equal(draw(steps=72, order="random"), draw(order="random"))
    assert (~mask).sum(-1).min() < 8 and mask.sum(-1).max() > 64


def test_a_sample_depends_on_its_own_key_only():
    """Tokens are equal at batch 1, at batch 8 and on eight devices. Other rows have other known tokens."""
    text, tokens = rows(8)
    keys = jax.random.split(jax.random.key(0), 8)
    known = (tokens, np.random.default_rng(0).random((8, N)) < np.linspace(0, 1, 8)[:, None])
    params = params_of(PRIOR)
    draw = functools.partial(PRIOR.sample, params, steps=4)
    together = np.asarray(draw(text, keys, known=known))
    for i in (0, 3, 7):
        one = slice(i, i + 1)
        np.testing.assert_array_equal(draw(text[one], keys[one], known=(known[0][one], known[1][one]))[0], together[i])
    over = over_rows(make_mesh(data=8), lambda text, keys, known: draw(text, keys, known=known), text, keys, known)
    np.testing.assert_array_equal(over, together)
    shared = draw(text[:2], keys)
    np.testing.assert_array_equal(shared, draw(text[:2].repeat(4, axis=0), keys))
    assert len(np.unique(np.asarray(shared), axis=0)) == 8


# -- errors -------------------------------------------------------------------------------------------------------


def test_a_prior_of_raster_order_says_how_to_train_another():
    text, keys = rows(1)[0], jax.random.split(jax.random.key(0), 1)
    raster = autoregressive()
    with pytest.raises(ConfigError, match=r"--config\.model\.order=diagonal"):
        raster.sample(params_of(raster), text, keys, steps=4)
    with pytest.raises(ConfigError, match="choice_temperature"):
        PRIOR.sample(params_of(PRIOR), text, keys, steps=4, choice_temperature=1.0)
    with pytest.raises(ConfigError, match="steps"):
        PRIOR.sample(params_of(PRIOR), text, keys, steps=N + 1)
    assert PRIOR.decoding_steps(None) == N and PRIOR.decoding_steps(5) == 5
