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
from prior_cases import LAYOUT, N, T, V, autoregressive, cached_logits, changed, loss_of, params_of, rows

from dalle_jax.configuration import config_files
from dalle_jax.errors import ConfigError
from dalle_jax.models.trunk import unstack
from dalle_jax.priors import orders, registry, sampling
from dalle_jax.priors.condition import Text
from dalle_jax.priors.guidance import guide
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
STARTED = make(start_tokens=True)
STARTED_DEEP = make({"depth": 9, "scan": True, "positions": "rotary"}, start_tokens=True, tied_embeddings=True)
ANY_ORDER = make({"depth": 2}, attention="full", order="random", start_tokens=True)
NEIGHBOURS = changed(ANY_ORDER, neighbour_kernel=3)


@functools.partial(jax.jit, static_argnums=0)
def forward(prior, params, text, tokens, cells=None):
    """Image logits of the whole stream at once, [B, N, V]."""
    return prior.model.apply({"params": params}, text, tokens, cells=cells)[1]


# -- no leak ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prior", [SPARSE, EVERY_CHOICE, FULL, STARTED], ids=["sparse", "every choice", "full", "start tokens"]
)
def test_no_leak(prior):
    """Each output depends on exactly the embeddings that the chained masks of the layers connect to it.

    Without start tokens, position i predicts token i + 1. With them, start-of-text and the text tokens but the last one
    predict the text, start-of-image and the image tokens but the last one predict the image.
    """
    text, tokens = rows(1)
    bound = functools.partial(prior.model.apply, {"params": params_of(prior)})
    started = prior.options.start_tokens
    before, predicted = (T + 2, T) if started else (T, T - 1)  # text positions, and the text tokens that are predicted
    places = np.array([*range(predicted), *range(before - 1, before + N - 1)])  # positions of the outputs

    @jax.jit
    def gradients():
        x = bound(text, tokens, method="embed")
        assert x.shape[1] == before + N
        (text_logits, image_logits), back = jax.vjp(lambda x: bound(x, method="logits"), x)
        assert text_logits.shape == (1, predicted, 11) and image_logits.shape == (1, N, V)
        weights = jax.random.normal(jax.random.key(0), (1, len(places), V))  # a random mix of each position's logits

        def gradient(i):
            chosen = jnp.where(jnp.arange(len(places))[None, :, None] == i, weights, 0)
            return back((chosen[:, :predicted, :11], chosen[:, predicted:]))[0][0]

        return jax.vmap(gradient)(jnp.arange(len(places)))  # [output, input, D]

    depends = np.any(np.asarray(gradients()) != 0, axis=-1)
    assert not depends[np.arange(before + N)[None] > places[:, None]].any()
    stream = dataclasses.replace(LAYOUT, condition=Text(10, before))
    reached = np.eye(before + N, dtype=bool)
    for pattern in prior.options.patterns:
        reached = pattern.mask(stream) @ reached
    np.testing.assert_array_equal(depends, reached[places])
    assert depends[predicted:, :before].all(), "every image token depends on all text"


@pytest.mark.parametrize(
    "prior", [SPARSE, STARTED, ANY_ORDER, NEIGHBOURS], ids=["sparse", "start tokens", "any order", "neighbours"]
)
def test_no_logit_depends_on_its_own_or_a_later_token(prior):
    """The same by tokens: another token changes only logits of later tokens, text before image."""
    text, tokens = rows(1)
    text = np.arange(T, dtype=np.int32)[None]
    cells = None if not prior.any_order else np.random.default_rng(0).permutation(N).astype(np.int32)[None]

    params = params_of(prior)

    @jax.jit
    def compute(params, text, tokens):
        of_text, of_image = prior.model.apply({"params": params}, text, tokens, cells=cells)
        given = T - of_text.shape[1]  # the first text token is given, and has no logits
        return jnp.concatenate([jnp.zeros((1, given)), of_text.sum(-1), of_image.sum(-1)], axis=1)[0]

    logits = functools.partial(compute, params)
    base = logits(text, tokens)
    for place in range(T + N):
        ids = np.concatenate([text, tokens], axis=1)
        ids[0, place] = (ids[0, place] + 1) % (10 if place < T else V)
        changed = np.asarray(logits(ids[:, :T], ids[:, T:])) != base
        assert not changed[: place + 1].any(), place
        assert place == T + N - 1 or changed[place + 1 :].any(), place


# -- cached decoding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prior", [EVERY_CHOICE, DEEP, FULL, STARTED_DEEP], ids=["every choice", "scanned", "full", "start tokens"]
)
@pytest.mark.parametrize("guided", [False, True])
def test_cached_decoding_equals_the_full_forward(prior, guided):
    """The logits agree at every position, with two candidates per caption, and a null caption each for guidance."""
    captions, _ = rows(2)
    text = np.concatenate([captions, np.tile(LAYOUT.condition.empty(), (2, 1))]) if guided else captions
    _, tokens = rows(2 * len(text), seed=1)
    params = params_of(prior)

    unscanned = changed(prior, {"scan": False})
    cached = cached_logits(unscanned, {**params, "trunk": unstack(params["trunk"])}, text, tokens)
    expected = forward(prior, params, text.repeat(2, axis=0), tokens)
    np.testing.assert_allclose(cached, expected, atol=1e-4)
    assert np.asarray(expected).std() > 0.3, "equal logits would prove nothing"


SAMPLERS = {
    "greedy": {"temperature": 0.0},
    "hot": {"temperature": 1.5},
    "guided, top-k": {"guidance": 2.0, "top_k": 5},
    "guided, top-p, given": {"guidance": 1.0, "top_p": 0.8, "temperature": 0.7, "known": True},
}


CASES = {name: (DEEP, knobs) for name, knobs in SAMPLERS.items()}
CASES |= {
    f"{kind}, {name}": (prior, SAMPLERS[name])
    for kind, prior in (("start tokens", STARTED_DEEP), ("any order", ANY_ORDER), ("neighbours", NEIGHBOURS))
    for name in ("hot", "guided, top-p, given")
}


@pytest.mark.parametrize("prior, knobs", CASES.values(), ids=CASES.keys())
def test_samples_are_draws_from_the_full_forward(prior, knobs):
    """Each token is drawn with the key of its place from the full forward's logits given the tokens before it."""
    knobs = dict(knobs)
    text, given = rows(2)
    mask = np.random.default_rng(5).random((4, N)) < 0.4
    known = (np.tile(given, (2, 1)), mask) if knobs.pop("known", False) else None
    keys = jax.random.split(jax.random.key(0), 4)
    tokens = np.asarray(prior.sample(params_of(prior), text, keys, known=known, **knobs))
    assert tokens.shape == (4, N) and tokens.dtype == np.int32 and 0 <= tokens.min() and tokens.max() < V

    text, cells = text.repeat(2, axis=0), None
    in_order = lambda x: x
    if prior.any_order:
        cells = orders.cells("random", keys, LAYOUT)
        cells = np.asarray(cells if known is None else orders.given_first(cells, mask))
        in_order = lambda x: np.take_along_axis(x, cells, axis=1)
    tokens = in_order(tokens)
    logits = forward(prior, params_of(prior), text, tokens, cells)
    if "guidance" in knobs:
        null = forward(prior, params_of(prior), np.tile(LAYOUT.condition.empty(), (4, 1)), tokens, cells)
        logits = guide(logits, null, knobs["guidance"])
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
        given, mask = in_order(known[0]), in_order(mask)
        expected = np.where(mask, given, expected)
        np.testing.assert_array_equal(tokens[mask], given[mask])
    np.testing.assert_array_equal(tokens, expected)
    assert len(np.unique(tokens)) > 3


# -- loss ---------------------------------------------------------------------------------------------------------


def nats(logits, targets):
    """Computes the mean cross-entropy of each row in float64."""
    logits = np.asarray(logits, np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(logp, targets[..., None], -1)[..., 0].mean(-1)


@pytest.mark.parametrize("prior", [SPARSE, STARTED], ids=["given first token", "start tokens"])
def test_loss_is_an_eighth_text_and_seven_eighths_image(prior):
    text, tokens = rows(4)
    params = params_of(prior)
    loss, scalars = loss_of(prior, params, text, tokens, jax.random.key(0), False)
    text_logits, image_logits = jax.jit(prior.model.apply)({"params": params}, text, tokens)
    # Text position p predicts the token at p + 1. All padding is one class. Without start tokens the first is given.
    predicted = text if prior is STARTED else text[:, 1:]
    of_text = nats(text_logits, np.minimum(predicted, 10))
    of_image = nats(image_logits, tokens)
    np.testing.assert_allclose(scalars["text_nats"], of_text.mean(), rtol=1e-5)
    np.testing.assert_allclose(scalars["image_nats"], of_image.mean(), rtol=1e-5)
    np.testing.assert_allclose(loss, of_text.mean() / 8 + of_image.mean() * 7 / 8, rtol=1e-5)

    valid = np.array([True, False, True, False])
    _, scalars = loss_of(prior, params, text, tokens, jax.random.key(0), False, valid)
    np.testing.assert_allclose(scalars["text_nats"], of_text[::2].mean(), rtol=1e-5)
    np.testing.assert_allclose(scalars["image_nats"], of_image[::2].mean(), rtol=1e-5)


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("start_tokens, total", [(True, 1.0), (False, 3.0)])
def test_the_probabilities_of_all_captions_sum_to_one(length, start_tokens, total):
    """With start tokens, p(text) is a model of whole captions. Without them each of the three first tokens is given."""
    layout = dataclasses.replace(LAYOUT, condition=Text(2, length))
    prior = dataclasses.replace(make(start_tokens=start_tokens), layout=layout)
    classes = np.stack(np.meshgrid(*[np.arange(3)] * length), -1).reshape(-1, length)  # two words, and padding
    captions = np.where(classes < 2, classes, layout.condition.empty()).astype(np.int32)
    _, tokens = rows(1, layout=layout)
    one = lambda text: loss_of(prior, params_of(prior), text[None], tokens, jax.random.key(0), False)[1]["text_nats"]
    mean = np.asarray(jax.vmap(one)(captions), np.float64)
    predicted = prior.options.predicted_text(layout)
    probabilities = np.exp(-mean * predicted) if predicted else np.ones(len(mean))
    np.testing.assert_allclose(probabilities.sum(), total, rtol=1e-5)
    assert not predicted or probabilities.std() > 1e-3


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("start_tokens", [False, True])
def test_a_text_of_one_token(tied, start_tokens):
    """Without start tokens the only token is given, so there is no text loss. The loss is finite in both cases."""
    layout = dataclasses.replace(LAYOUT, condition=Text(10, 1))
    prior = dataclasses.replace(make(tied_embeddings=tied, start_tokens=start_tokens), layout=layout)
    text, tokens = rows(4, layout=layout)
    value = jax.value_and_grad(lambda p: prior.loss(p, text, tokens, jax.random.key(0), train=True), has_aux=True)
    (loss, scalars), grads = jax.jit(value)(params_of(prior))
    assert np.isfinite(loss) and np.isnan(scalars["text_nats"]) == (not start_tokens)
    assert (loss == scalars["image_nats"]) == (not start_tokens)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


# -- from a configuration -----------------------------------------------------------------------------------------


CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    "variant, billions, count",
    [("paper", 12, 12_292_058_496), ("5.6b", 5.6, 5_684_466_816), ("2.8b", 2.8, 2_927_871_360)],
)
def test_published_sizes(variant, billions, count):
    config = config_files.load(f"{CONFIGS}/prior.py:{variant}")
    layout = TokenLayout(Text(config.text.vocab_size, config.text.length), config.tokenizer.model.vocab_size, 32, 32)
    prior = registry.make(config.prior, config.model, layout)
    shapes = jax.eval_shape(prior.init, jax.random.key(0))
    found = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert found == count, f"{found:,}"
    assert abs(found / (billions * 1e9) - 1) < 0.05


@pytest.mark.parametrize("name, is_paper", [("paper", True), ("5.6b", True), ("2.8b", True), ("coco", False)])
def test_only_the_papers_sizes_have_its_numbers(name, is_paper):
    """Section 2.2, figures 4 and 10, appendices B.2 and D.2. All other variants stay as they were."""
    config = config_files.load(f"{CONFIGS}/prior.py:{name}")
    model, trunk = config.model, config.model.trunk
    chosen = (model.start_tokens, trunk.float32_residual, trunk.float32_logits, not model.tied_embeddings)
    assert chosen == (is_paper,) * 4
    assert (model.caption_drop, config.optimizer.clip_variance) == ((0.0, 5.0) if is_paper else (0.1, 0.0))
    masked = config_files.load(f"{CONFIGS}/maskgit.py:{name}") if name in ("paper", "coco") else None
    if masked:  # it reads the prior's configuration, but only the stream in float32 is its own, too
        assert masked.model.trunk.float32_residual == is_paper and not masked.model.trunk.float32_logits
        assert (masked.model.caption_drop, masked.optimizer.clip_variance) == (0.0 if is_paper else 0.1, 0.0)


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
