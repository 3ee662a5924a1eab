"""Drawing in pieces: the same tokens as `sample`, shown while they are drawn."""

import jax
import numpy as np
import pytest
from prior_cases import LAYOUT, PRIORS, N, changed, params_of, rows

from dalle_jax.models.attention import decode_cache

SLOW = ("start tokens", "any order, start tokens", "maskgit, small data", "maskgit, published")
MASK = LAYOUT.mask_id
every_prior = pytest.mark.parametrize(
    "prior", [pytest.param(p, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name, p in PRIORS.items()]
)


def watched(prior, text, keys, **options):
    """Returns the tokens of each frame, int32 [frames, B, N], and the progress of each."""
    tokens, progress = zip(*prior.watch(params_of(prior), text, keys, **options))
    return np.stack(tokens), list(progress)


@every_prior
@pytest.mark.parametrize(
    "options", [{}, {"guidance": 2.0, "temperature": 0.7, "top_k": 5}, {"final_temperature": 0.3}], ids=str
)
def test_the_last_tokens_are_those_of_sample(prior, options):
    text, _ = rows(2)
    keys = jax.random.split(jax.random.key(0), 6)
    tokens, progress = watched(prior, text, keys, **options)
    np.testing.assert_array_equal(tokens[-1], prior.sample(params_of(prior), text, keys, **options))
    assert len(np.unique(tokens[-1], axis=0)) == 6
    assert progress == sorted(set(progress)) and progress[-1] == 1


@every_prior
def test_drawn_tokens_stay(prior):
    """Each frame has more tokens than the one before. A token that is drawn does not change any more."""
    text, _ = rows(3)
    tokens, _ = watched(prior, text, jax.random.split(jax.random.key(1), 3))
    drawn = tokens != MASK
    assert (np.diff(drawn.sum(-1), axis=0) > 0).all() and drawn[-1].all()
    for before, after in zip(tokens, tokens[1:]):
        np.testing.assert_array_equal(after[before != MASK], before[before != MASK])


def test_an_autoregressive_prior_is_seen_row_by_row():
    text, _ = rows(2)
    tokens, progress = watched(PRIORS["autoregressive"], text, jax.random.split(jax.random.key(0), 2))
    ends = LAYOUT.width * np.arange(1, LAYOUT.height + 1)
    np.testing.assert_array_equal((tokens != MASK).sum(-1), np.tile(ends[:, None], (1, 2)))
    assert progress == [end / N for end in ends]


@every_prior
def test_known_tokens_are_seen_from_the_start(prior):
    text, tokens = rows(2)
    mask = np.random.default_rng(0).random((2, N)) < 0.4
    keys = jax.random.split(jax.random.key(0), 2)
    frames, _ = watched(prior, text, keys, known=(tokens, mask))
    for frame in frames:
        np.testing.assert_array_equal(frame[mask], tokens[mask])
    np.testing.assert_array_equal(frames[-1], prior.sample(params_of(prior), text, keys, known=(tokens, mask)))


def test_groups_of_tokens_are_seen_at_the_end():
    prior, (text, _) = PRIORS["any order"], rows(2)
    keys = jax.random.split(jax.random.key(0), 2)
    tokens, progress = watched(prior, text, keys, steps=4)
    np.testing.assert_array_equal(tokens[-1], prior.sample(params_of(prior), text, keys, steps=4))
    assert progress == [1]


@pytest.mark.parametrize("name", ["autoregressive", "shifted"])
def test_growing_caches(name, monkeypatch):
    """Pieces end where a cache grows, too: the loops of `sample` have the same sizes."""
    monkeypatch.setattr(decode_cache, "_SHORT", 4)
    prior = changed(PRIORS[name], attention="full", **({"torus": False} if name == "shifted" else {}))
    parts = decode_cache.stages([p.cache(prior.stream) for p in prior.options.patterns], N - 1)
    assert len(parts) == 4
    text, _ = rows(2)
    keys = jax.random.split(jax.random.key(0), 4)
    tokens, _ = watched(prior, text, keys)
    np.testing.assert_array_equal(tokens[-1], prior.sample(params_of(prior), text, keys))


def test_nothing_runs_after_the_last_frame_that_is_read():
    """A caller that stops reading stops the drawing."""
    text, _ = rows(1)
    frames = PRIORS["maskgit"].watch(params_of(PRIORS["maskgit"]), text, jax.random.split(jax.random.key(0), 1))
    tokens, progress = next(frames)
    frames.close()
    assert 0 < progress < 1 and (np.asarray(tokens) == MASK).any()
