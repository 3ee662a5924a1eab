"""Which updates of an autoregressive prior have random orders, and the configurations that ask for them."""

import copy
import functools
from pathlib import Path

import jax
import numpy as np
import pytest
from prior_cases import LAYOUT, N, autoregressive, changed, loss_of, params_of, rows

from dalle_jax.configuration import config_files
from dalle_jax.configuration.options import from_config
from dalle_jax.errors import ConfigError
from dalle_jax.priors import orders, registry
from dalle_jax.priors.autoregressive_model import AutoregressiveOptions
from dalle_jax.priors.losses import cross_entropy
from dalle_jax.tasks.prior import check_config

CONFIGS = Path(__file__).parents[2] / "configs"
RANDOM = autoregressive(attention="full", order="random", caption_drop=0.0)
STAGED = changed(RANDOM, raster_steps=10, anneal_start=20, anneal_end=30)


def test_the_share_of_random_orders():
    share = lambda prior, step: float(prior.schedules["random_orders"](step))
    assert [share(STAGED, step) for step in (0, 9, 10, 20, 25, 30, 99)] == [0, 0, 1, 1, 0.5, 0, 0]
    assert [share(changed(RANDOM, raster_steps=10), step) for step in (9, 10, 99)] == [0, 1, 1]
    assert share(RANDOM, 0) == share(RANDOM, 99) == 1
    assert autoregressive().schedules == {}


def test_updates_have_the_orders_of_the_schedule():
    """Raster order first, then random orders, and raster order again, which evaluation has if the training ends so."""
    text, tokens = rows(4)
    params, key = params_of(RANDOM), jax.random.key(1)

    @functools.partial(jax.jit, static_argnums=0)
    def loss(prior, params, step):
        return prior.loss(params, text, tokens, key, train=True, step=step)[1]["image_nats"]

    raster = loss_of(STAGED, params, text, tokens, key, False)[1]["image_nats"]
    random = loss_of(RANDOM, params, text, tokens, key, False)[1]["image_nats"]
    assert abs(raster - random) > 1e-3
    for step, expected in ((0, raster), (9, raster), (10, random), (20, random), (30, raster)):
        np.testing.assert_allclose(loss(STAGED, params, step), expected, rtol=1e-5)
    np.testing.assert_allclose(loss(RANDOM, params, 0), random, rtol=1e-5)


def test_diagonal_orders_are_trained_and_drawn():
    """Training and evaluation shuffle each diagonal. Drawing does not, and edits are not offered."""
    text, tokens = rows(4)
    prior = changed(RANDOM, order="diagonal")
    params, key = params_of(prior), jax.random.key(1)
    nats = lambda key, train: loss_of(prior, params, text, tokens, key, train)[1]["image_nats"]
    cells = np.asarray(orders.shuffled_diagonals(jax.random.fold_in(key, 2), 4, LAYOUT))
    in_order = np.take_along_axis(tokens, cells, axis=1)
    logits = jax.jit(prior.model.apply)({"params": params}, text, in_order, cells=cells)[1]
    for train in (False, True):
        np.testing.assert_allclose(nats(key, train), cross_entropy(logits, in_order).mean(), rtol=1e-5)
    assert abs(nats(key, True) - nats(jax.random.key(2), True)) > 1e-4, "another order"
    assert not prior.any_order and not prior.schedules
    keys = jax.random.split(key, 4)
    drawn = prior.sample(params, text, keys)
    np.testing.assert_array_equal(drawn, RANDOM.sample(params, text, keys, order="diagonal"))
    np.testing.assert_array_equal(prior.sample(params, text, keys, steps=N), drawn)
    with pytest.raises(ConfigError, match="diagonal"):
        prior.sample(params, text, keys, order="random")


@pytest.mark.parametrize("variant", ["shapes", "small", "emoji", "coco"])
def test_order_is_one_flag(variant):
    """Attention follows it, and so does a copy of the configuration. Other keys stay as they are."""
    plain = config_files.load(f"{CONFIGS}/prior.py:{variant}")
    config = copy.deepcopy(plain)
    assert config.model.attention == "sparse"
    config.model.order = "random"
    assert config.model.attention == "full" and copy.deepcopy(config).model.attention == "full"
    prior = registry.make(config.prior, config.model, LAYOUT)
    assert prior.any_order and all(pattern.mask(LAYOUT)[-1].all() for pattern in prior.options.patterns)
    assert plain.model.attention == "sparse"
    config.model.order = "diagonal"
    assert config.model.attention == "full" and config.model.neighbour_kernel == 3
    assert registry.make(config.prior, config.model, LAYOUT).options.knows_next
    config.model.order = "raster"
    assert config.to_json() == plain.to_json()
    config.model.order, config.model.attention = "random", "sparse"
    with pytest.raises(ConfigError, match=r"--config\.model\.attention=full"):
        registry.make(config.prior, config.model, LAYOUT)


def test_an_old_configuration_has_no_updates_in_raster_order():
    old = {"trunk": {}, "attention": "full", "order": "random", "anneal_start": 0, "anneal_end": 0}
    assert from_config(AutoregressiveOptions, old, "model").raster_steps == 0


@pytest.mark.parametrize(
    "changes, key",
    [
        (dict(raster_steps=10), "order=random"),
        (dict(neighbour_kernel=3), "order=diagonal"),
        (dict(order="diagonal", raster_steps=10), "order=random"),
        (dict(order="diagonal", anneal_end=20), "order=random"),
        (dict(order="random", neighbour_kernel=2), "neighbour_kernel"),
        (dict(anneal_start=10, anneal_end=20), "order=random"),
        (dict(order="random", raster_steps=30), "raster_steps"),
        (dict(order="random", anneal_end=31), "anneal_end=30"),
        (dict(order="random", anneal_start=21, anneal_end=20), "anneal_start"),
        (dict(order="random", raster_steps=20, anneal_start=10, anneal_end=20), "raster_steps=0"),
    ],
)
def test_orders_that_contradict_each_other_are_rejected(changes, key):
    config = config_files.load(f"{CONFIGS}/prior.py:shapes")
    config.steps = 30
    config.model.update(changes)
    with pytest.raises(ConfigError, match=key):
        check_config(config)
    config.model.update(dict(order="random", raster_steps=9, anneal_start=19, anneal_end=30, neighbour_kernel=3))
    check_config(config)
