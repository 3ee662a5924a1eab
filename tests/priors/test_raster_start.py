"""MaskGIT's first updates in raster order: what a position sees, and when the loss changes."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prior_cases import LAYOUT, N, changed, maskgit, params_of, rows

from configs import maskgit as config_file
from dalle_jax.errors import ConfigError
from dalle_jax.priors.maskgit_model import MaskGITModel
from dalle_jax.tasks.registry import check_config

STEPS = 3
PRIOR = maskgit(neighbour_kernel=3, head="linear", tied_embeddings=False, raster_steps=STEPS, label_smoothing=0.1)
RASTER = MaskGITModel(PRIOR.options, LAYOUT, raster=True)
SCALARS = ("image_nats", "image_accuracy")


def prefixes(tokens):
    """Returns N rows of one image: row i holds its first i tokens, and the mask after them."""
    return np.where(np.arange(N)[None] < np.arange(N)[:, None], tokens[None], LAYOUT.mask_id)


def test_a_position_looks_as_if_it_and_all_later_tokens_were_masked():
    bound, tokens = {"params": params_of(PRIOR)}, rows(1)[1][0]
    image = lambda model, x: model.embedding.image(x)
    raster = RASTER.apply(bound, tokens[None], method=image)[0]
    masked = PRIOR.model.apply(bound, prefixes(tokens), method=image)
    np.testing.assert_allclose(raster, masked[np.arange(N), np.arange(N)], atol=1e-5)


def test_logits_depend_on_the_tokens_before_a_position_only():
    (text, tokens), bound = rows(1), {"params": params_of(PRIOR)}
    logits = jax.jit(RASTER.apply)(bound, text, tokens)[0]
    other = np.tile(tokens, (N, 1))
    other[np.arange(N), np.arange(N)] = (other[np.arange(N), np.arange(N)] + 1) % LAYOUT.image_vocab
    moved = jax.jit(RASTER.apply)(bound, np.tile(text, (N, 1)), other)
    depends = np.abs(np.asarray(moved - logits[None])).max(-1) > 1e-4  # [token that changed, position]
    assert not np.tril(depends).any(), "no position sees itself or a later token"
    # A token is visible from the next position on, or from the next row's last but one if it ends a row.
    row, column = np.divmod(np.arange(N), LAYOUT.width)
    first = np.where(column < LAYOUT.width - 1, np.arange(N) + 1, (row + 2) * LAYOUT.width - 2)
    assert depends[np.arange(N)[None] >= first[:, None]].all(), "a position sees all tokens before it"


def test_the_caption_conditions_raster_order_too():
    (text, tokens), bound = rows(2), {"params": params_of(PRIOR)}
    same = np.tile(tokens[:1], (2, 1))
    logits = jax.jit(RASTER.apply)(bound, text, same)
    assert (np.abs(logits[0] - logits[1]).max(-1) > 1e-4).all()


@pytest.mark.parametrize("scan", [False, True])
def test_both_ways_share_all_parameters(scan):
    prior = changed(PRIOR, trunk={"scan": scan, "depth": 3})
    text, tokens = rows(1)
    raster = dataclasses.replace(prior.model, raster=True)
    shapes = lambda model: nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), text, tokens)["params"])
    assert jax.tree.map(lambda x: x.shape, shapes(raster)) == jax.tree.map(lambda x: x.shape, shapes(prior.model))


def test_the_first_updates_use_raster_order_and_the_others_random_masks():
    (text, tokens), params, key = rows(8), params_of(PRIOR), jax.random.key(3)
    prior = changed(PRIOR, caption_drop=0.0)
    loss = jax.jit(lambda params, step: prior.loss(params, text, tokens, key, train=True, step=step))
    logits = np.asarray(jax.jit(RASTER.apply)({"params": params}, text, tokens), np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = -np.take_along_axis(logp, tokens[..., None], -1)[..., 0]
    expected = (0.9 * nats - 0.1 * logp.mean(-1)).mean()
    for step in range(STEPS):
        value, scalars = loss(params, step)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        np.testing.assert_allclose(scalars["image_nats"], nats.mean(), rtol=1e-5)
        np.testing.assert_allclose(scalars["image_accuracy"], (logits.argmax(-1) == tokens).mean(), rtol=1e-5)
        assert all(np.isnan(scalars[name]) for name in scalars if name not in SCALARS), "nothing is masked"
    plain = changed(prior, raster_steps=0)
    value, scalars = jax.jit(lambda params: plain.loss(params, text, tokens, key, train=True, step=STEPS))(params)
    found, others = loss(params, STEPS)
    np.testing.assert_allclose(found, value, rtol=1e-6)
    assert found != pytest.approx(expected, rel=1e-3)
    for name in scalars:
        np.testing.assert_allclose(others[name], scalars[name], rtol=1e-6)


def test_rows_that_do_not_count_have_no_effect_in_raster_order():
    (text, tokens), key = rows(8), jax.random.key(3)
    prior = changed(PRIOR, caption_drop=0.0)
    valid = jnp.arange(8) < 5
    loss = jax.jit(lambda params, *rows: prior.loss(params, *rows[:2], key, train=True, valid=rows[2], step=0)[0])
    part = loss(params_of(PRIOR), text[:5], tokens[:5], valid[:5])
    np.testing.assert_allclose(loss(params_of(PRIOR), text, tokens, valid), part, rtol=1e-5)


def test_evaluation_always_masks():
    (text, tokens), params, key = rows(8), params_of(PRIOR), jax.random.key(3)
    loss = lambda prior: jax.jit(lambda params: prior.loss(params, text, tokens, key, train=False, step=0)[0])(params)
    np.testing.assert_array_equal(loss(PRIOR), loss(changed(PRIOR, raster_steps=0)))


def test_the_schedule_says_which_updates_use_raster_order():
    schedule = PRIOR.schedules["raster_order"]
    assert [float(schedule(jnp.int32(step))) for step in range(STEPS + 2)] == [1.0] * STEPS + [0.0, 0.0]
    assert not maskgit().schedules


@pytest.mark.parametrize(
    "options", [dict(raster_steps=-1), dict(raster_steps=10), dict(raster_steps=10, neighbour_kernel=1)]
)
def test_impossible_options_are_rejected(options):
    with pytest.raises(ConfigError, match="raster_steps"):
        maskgit(**options)


@pytest.mark.parametrize("step", [0, STEPS])
def test_gradients_are_those_of_the_chosen_loss(step):
    (text, tokens), params, key = rows(4), params_of(PRIOR), jax.random.key(3)
    loss = lambda params, step: 3 * PRIOR.loss(params, text, tokens, key, train=True, step=step)[0]
    plain = PRIOR._masked_loss if step else PRIOR._raster_loss
    how = dict(train=True) if step else {}
    expected = jax.jit(jax.grad(lambda params: 3 * plain(params, key, text, tokens, None, **how)[0]))(params)
    found = jax.jit(jax.grad(loss))(params, step)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


SMALL = ("small", "classes", "shape_classes", "clipgen", "upsample")


def test_the_small_variants_begin_in_raster_order_whatever_their_length():
    for name in config_file.VARIANTS:
        config = config_file.get_config(name)
        for steps in (30, 3000):
            config.steps = steps
            assert config.model.raster_steps == (steps // 3 if name in SMALL else 0)


def test_a_training_without_random_masks_is_rejected():
    config = config_file.get_config("shapes")
    config.steps, config.model.raster_steps = 30, 29
    check_config(config)
    config.model.raster_steps = 30
    with pytest.raises(ConfigError, match="raster_steps"):
        check_config(config)
