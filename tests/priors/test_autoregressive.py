"""The autoregressive prior: causality, cached decoding, samples and the loss."""

import dataclasses
import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from prior_cases import LAYOUT, N, T, V, autoregressive, loss_of, params_of, rows

from dalle_jax.configuration import config_files
from dalle_jax.errors import ConfigError
from dalle_jax.models.trunk import unstack
from dalle_jax.priors import registry, sampling
from dalle_jax.priors.autoregressive import AutoregressiveModel
from dalle_jax.token_layout import TokenLayout


def make(trunk=None, **options):
    return autoregressive({"depth": 5, **(trunk or {})}, **options)


SPARSE = make()
EVERY_CHOICE = make(
    {"positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "qk_norm": True},
    wrap=False,
    tied_embeddings=True,
)
# Scanned: (row, column, row, row) twice, and the convolutional layer.
DEEP = make({"depth": 9, "scan": True})
FULL = make({"depth": 2, "scan": True}, attention="full")


@functools.partial(jax.jit, static_argnums=0)
def forward(prior, params, text, tokens):
    """Image logits of the whole stream at once, [B, N, V]."""
    return prior.model.apply({"params": params}, text, tokens)[1]


# -- no leak ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", [SPARSE, EVERY_CHOICE, FULL], ids=["sparse", "every choice", "full"])
def test_no_leak(prior):
    """Output i depends on exactly the embeddings that the chained masks of the layers connect to it."""
    text, tokens = rows(1)
    bound = functools.partial(prior.model.apply, {"params": params_of(prior)})
    outputs = LAYOUT.length - 1

    @jax.jit
    def gradients():
        x = bound(text, tokens, method="embed")
        (text_logits, image_logits), back = jax.vjp(lambda x: bound(x, method="logits"), x)
        assert text_logits.shape == (1, T - 1, 11) and image_logits.shape == (1, N, V)
        weights = jax.random.normal(jax.random.key(0), (1, outputs, V))  # a random mix of each position's logits

        def gradient(i):
            chosen = jnp.where(jnp.arange(outputs)[None, :, None] == i, weights, 0)
            return back((chosen[:, : T - 1, :11], chosen[:, T - 1 :]))[0][0]

        return jax.vmap(gradient)(jnp.arange(outputs))  # [output, input, D]

    depends = np.any(np.asarray(gradients()) != 0, axis=-1)
    later = np.triu(np.ones((outputs, LAYOUT.length), bool), 1)
    assert not depends[later].any()
    reached = np.eye(LAYOUT.length, dtype=bool)
    for pattern in prior.options.patterns:
        reached = pattern.mask(LAYOUT) @ reached
    np.testing.assert_array_equal(depends, reached[:outputs])
    assert depends[T - 1 :, :T].all(), "every image token depends on all text"


# -- cached decoding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", [EVERY_CHOICE, DEEP, FULL], ids=["every choice", "scanned", "full"])
@pytest.mark.parametrize("guided", [False, True])
def test_cached_decoding_equals_the_full_forward(prior, guided):
    """The logits agree at every position, with two candidates per caption, and a null caption each for guidance."""
    captions, _ = rows(2)
    text = np.concatenate([captions, np.tile(LAYOUT.null_text(), (2, 1))]) if guided else captions
    _, tokens = rows(2 * len(text), seed=1)
    params = params_of(prior)

    @jax.jit
    def cached(params, tokens):
        trunk = dataclasses.replace(prior.options.trunk, scan=False)
        model = AutoregressiveModel(dataclasses.replace(prior.options, trunk=trunk), LAYOUT)
        flat = {**params, "trunk": unstack(params["trunk"])}
        bound = functools.partial(model.apply, {"params": flat})
        first, text_cache = bound(text, method="prefill")

        def step(caches, position):
            here, following = (jnp.full(len(tokens), p) for p in (position, position + 1))
            logits, caches = bound(tokens[:, position], position, here, following, text_cache, caches, method="step")
            return caches, logits

        later = jax.lax.scan(step, bound(len(tokens), method="init_cache"), jnp.arange(N - 1))[1]
        return jnp.concatenate([jnp.repeat(first, 2, axis=0)[None], later]).swapaxes(0, 1)

    expected = forward(prior, params, text.repeat(2, axis=0), tokens)
    np.testing.assert_allclose(cached(params, tokens), expected, atol=1e-4)
    assert np.asarray(expected).std() > 0.3, "equal logits would prove nothing"


SAMPLERS = {
    "greedy": {"temperature": 0.0},
    "hot": {"temperature": 1.5},
    "guided, top-k": {"guidance": 2.0, "top_k": 5},
    "guided, top-p, given": {"guidance": 1.0, "top_p": 0.8, "temperature": 0.7, "known": True},
}


@pytest.mark.parametrize("knobs", SAMPLERS.values(), ids=SAMPLERS.keys())
def test_samples_are_draws_from_the_full_forward(knobs):
    """Each token is drawn with its position's key from the full forward's logits given the tokens before it."""
    knobs = dict(knobs)
    text, given = rows(2)
    mask = np.random.default_rng(5).random((4, N)) < 0.4
    known = (np.tile(given, (2, 1)), mask) if knobs.pop("known", False) else None
    keys = jax.random.split(jax.random.key(0), 4)
    tokens = np.asarray(DEEP.sample(params_of(DEEP), text, keys, known=known, **knobs))
    assert tokens.shape == (4, N) and tokens.dtype == np.int32 and 0 <= tokens.min() and tokens.max() < V

    text = text.repeat(2, axis=0)
    logits = forward(DEEP, params_of(DEEP), text, tokens)
    if "guidance" in knobs:
        null = forward(DEEP, params_of(DEEP), np.tile(LAYOUT.null_text(), (4, 1)), tokens)
        logits = sampling.guide(logits, null, knobs["guidance"])
    temperature = knobs.get("temperature", 1.0)

    @jax.jit
    def choose(logits, position):
        logits = sampling.filter_logits(
            logits / (temperature or 1.0), top_k=knobs.get("top_k"), top_p=knobs.get("top_p")
        )
        folded = jax.vmap(jax.random.fold_in, (0, None))(keys, position)
        return sampling.draw(logits, folded, jnp.float32(temperature > 0))

    expected = np.stack([choose(logits[:, i], i) for i in range(N)], axis=1)
    if known is not None:
        expected = np.where(mask, known[0], expected)
        np.testing.assert_array_equal(tokens[mask], known[0][mask])
    np.testing.assert_array_equal(tokens, expected)
    assert len(np.unique(tokens)) > 3


# -- loss ---------------------------------------------------------------------------------------------------------


def nats(logits, targets):
    """Computes the mean cross-entropy of each row in float64."""
    logits = np.asarray(logits, np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(logp, targets[..., None], -1)[..., 0].mean(-1)


def test_loss_is_an_eighth_text_and_seven_eighths_image():
    text, tokens = rows(4)
    params = params_of(SPARSE)
    loss, scalars = loss_of(SPARSE, params, text, tokens, jax.random.key(0), False)
    text_logits, image_logits = jax.jit(SPARSE.model.apply)({"params": params}, text, tokens)
    # Text position p predicts the token at p + 1. All padding is one class, and the first token is given.
    of_text = nats(text_logits, np.minimum(text[:, 1:], 10))
    of_image = nats(image_logits, tokens)
    np.testing.assert_allclose(scalars["text_nats"], of_text.mean(), rtol=1e-5)
    np.testing.assert_allclose(scalars["image_nats"], of_image.mean(), rtol=1e-5)
    np.testing.assert_allclose(loss, of_text.mean() / 8 + of_image.mean() * 7 / 8, rtol=1e-5)

    valid = np.array([True, False, True, False])
    _, scalars = loss_of(SPARSE, params, text, tokens, jax.random.key(0), False, valid)
    np.testing.assert_allclose(scalars["text_nats"], of_text[::2].mean(), rtol=1e-5)
    np.testing.assert_allclose(scalars["image_nats"], of_image[::2].mean(), rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_a_text_of_one_token_leaves_the_image_loss(tied):
    """The first text token is given, so a text of length 1 has no text loss, and the loss stays finite."""
    layout = dataclasses.replace(LAYOUT, text_length=1)
    prior = dataclasses.replace(make(tied_embeddings=tied), layout=layout)
    text, tokens = rows(4, layout=layout)
    value = jax.value_and_grad(lambda p: prior.loss(p, text, tokens, jax.random.key(0), train=True), has_aux=True)
    (loss, scalars), grads = jax.jit(value)(params_of(prior))
    assert np.isfinite(loss) and loss == scalars["image_nats"] and np.isnan(scalars["text_nats"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


# -- from a configuration -----------------------------------------------------------------------------------------


CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    "variant, billions, tolerance", [("paper", 12.0, 0.02), ("5.6b", 5.6, 0.04), ("2.8b", 2.8, 0.04)]
)
def test_published_sizes(variant, billions, tolerance):
    config = config_files.load(f"{CONFIGS}/prior.py:{variant}")
    layout = TokenLayout(config.text.vocab_size, config.tokenizer.model.vocab_size, config.text.length, 32, 32)
    prior = registry.make(config.prior, config.model, layout)
    shapes = jax.eval_shape(prior.init, jax.random.key(0))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert abs(count / (billions * 1e9) - 1) < tolerance, f"{count:,}"


def test_invalid_configurations():
    trunk = {"width": 16, "depth": 2, "heads": 2}
    assert registry.make("autoregressive", ConfigDict({"trunk": trunk, "kernel": 3}), LAYOUT).options.kernel == 3
    with pytest.raises(ConfigError, match="diffusion"):
        registry.make("diffusion", {"trunk": trunk}, LAYOUT)
    with pytest.raises(ConfigError, match="widht"):
        registry.make("autoregressive", {"trunk": {"widht": 16}}, LAYOUT)
    with pytest.raises(ConfigError, match="kernl"):
        registry.make("autoregressive", {"trunk": trunk, "kernl": 3}, LAYOUT)
    for changes, token in (
        ({"attention": "linear"}, "linear"),
        ({"kernel": 4}, "kernel"),
        ({"kernel": 0}, "kernel"),
        ({"text_weight": 1.5}, "text_weight"),
        ({"caption_drop": -0.1}, "caption_drop"),
    ):
        with pytest.raises(ConfigError, match=token):
            registry.make("autoregressive", {"trunk": trunk, **changes}, LAYOUT)
