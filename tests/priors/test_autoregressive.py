"""The autoregressive prior: nothing leaks, the caches are the full forward, a sample is its own key's."""

import dataclasses
import functools
import math
import pathlib

import flax.linen as nn
import golden_updates
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from dalle_jax import config_files, parallel, priors
from dalle_jax.errors import ConfigError
from dalle_jax.layout import TokenLayout
from dalle_jax.models.transformer import TransformerOptions, unstack
from dalle_jax.priors import sampling
from dalle_jax.priors.autoregressive import AutoregressiveModel, AutoregressiveOptions, AutoregressivePrior

LAYOUT = TokenLayout(text_vocab=10, image_vocab=16, text_length=4, height=3, width=4)
T, N, V = LAYOUT.text_length, LAYOUT.image_length, LAYOUT.image_vocab


def make(trunk=None, layout=LAYOUT, **options):
    sizes = {"width": 16, "depth": 5, "heads": 2, "dtype": "float32", "scan": False, **(trunk or {})}
    return AutoregressivePrior(layout, AutoregressiveOptions(TransformerOptions(**sizes), **{"kernel": 3, **options}))


def drawn(prior, scale=0.3):
    """Parameters of the prior's shapes, drawn by numpy: large enough for every input to matter."""
    rng = np.random.default_rng(2)
    shapes = nn.meta.unbox(jax.eval_shape(prior.init, jax.random.key(0)))

    def draw(path, leaf):
        around = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        return (around + scale * rng.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def rows(count, seed=0, layout=LAYOUT):
    rng = np.random.default_rng(seed)
    captions = [rng.integers(0, layout.text_vocab, rng.integers(1, layout.text_length + 1)) for _ in range(count)]
    tokens = rng.integers(0, layout.image_vocab, (count, layout.image_length), dtype=np.int32)
    return np.stack([layout.pad_text(ids) for ids in captions]), tokens


SPARSE = make()
EVERY_CHOICE = make(
    {"positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "qk_norm": True},
    wrap=False,
    tied_embeddings=True,
)
# Scanned: (row, column, row, row) twice, and the convolutional layer.
DEEP = make({"depth": 9, "scan": True})
FULL = make({"depth": 2, "scan": True}, attention="full")


@functools.cache
def params_of(prior):
    return drawn(prior)


@functools.partial(jax.jit, static_argnums=0)
def forward(prior, params, text, tokens):
    """Image logits of the whole stream at once, [B, N, V]."""
    return prior.model.apply({"params": params}, text, tokens)[1]


# -- no leak ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", [SPARSE, EVERY_CHOICE, FULL], ids=["sparse", "every choice", "full"])
def test_no_leak(prior):
    """Output i depends on the embeddings that the layers' masks chain to it, and on no later one, exactly."""
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
    assert depends[T - 1 :, :T].all(), "every image token sees all text"


# -- cached decoding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", [EVERY_CHOICE, DEEP, FULL], ids=["every choice", "scanned", "full"])
@pytest.mark.parametrize("guided", [False, True])
def test_cached_decoding_equals_the_full_forward(prior, guided):
    """At every position, with two candidates for each caption, and a null caption for each in guidance."""
    captions, _ = rows(2)
    text = np.concatenate([captions, np.tile(LAYOUT.null_text(), (2, 1))]) if guided else captions
    _, tokens = rows(2 * len(text), seed=1)
    params = params_of(prior)

    @jax.jit
    def cached(params, tokens):
        trunk = dataclasses.replace(prior.options.trunk, scan=False)
        model = AutoregressiveModel(dataclasses.replace(prior.options, trunk=trunk), LAYOUT)
        flat = {**params, "trunk": unstack(params["trunk"], prior.options.patterns)}
        bound = functools.partial(model.apply, {"params": flat})
        first, text_cache = bound(text, method="prefill")

        def step(caches, position):
            logits, caches = bound(tokens[:, position], position, text_cache, caches, method="step")
            return caches, logits

        later = jax.lax.scan(step, bound(len(tokens), method="init_cache"), jnp.arange(N - 1))[1]
        return jnp.concatenate([jnp.repeat(first, 2, axis=0)[None], later]).swapaxes(0, 1)

    expected = forward(prior, params, text.repeat(2, axis=0), tokens)
    np.testing.assert_allclose(cached(params, tokens), expected, atol=1e-4)
    assert np.asarray(expected).std() > 0.3, "logits that are all alike would prove nothing"


SAMPLERS = {
    "greedy": {"temperature": 0.0},
    "hot": {"temperature": 1.5},
    "guided, top-k": {"guidance": 2.0, "top_k": 5},
    "guided, top-p, given": {"guidance": 1.0, "top_p": 0.8, "temperature": 0.7, "known": True},
}


@pytest.mark.parametrize("knobs", SAMPLERS.values(), ids=SAMPLERS.keys())
def test_samples_are_what_the_full_forward_would_draw(knobs):
    """Each token is the choice, by its position's key, from the full forward's logits of the tokens before it."""
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


def test_everything_known_comes_back():
    text, given = rows(2)
    known = (given, np.ones((2, N), bool))
    tokens = DEEP.sample(params_of(DEEP), text, jax.random.split(jax.random.key(0), 2), known=known)
    np.testing.assert_array_equal(tokens, given)


# -- a sample is its own key's ------------------------------------------------------------------------------------


def test_a_sample_depends_on_its_own_key_alone():
    """The same tokens at batch 1, at batch 8, and on eight devices."""
    text, _ = rows(8)
    keys = jax.random.split(jax.random.key(0), 8)
    params = params_of(SPARSE)
    together = np.asarray(SPARSE.sample(params, text, keys))
    for i in (0, 3, 7):
        np.testing.assert_array_equal(SPARSE.sample(params, text[i : i + 1], keys[i : i + 1])[0], together[i])
    mesh = parallel.make_mesh(data=8)
    spread = parallel.batch_sharding(mesh)
    with parallel.on_mesh(mesh):
        placed = jax.device_put(params, parallel.replicated(mesh))
        shared = SPARSE.sample(placed, jax.device_put(text, spread), jax.device_put(keys, spread))
    assert len(shared.sharding.device_set) == 8
    np.testing.assert_array_equal(shared, together)
    assert len(np.unique(together, axis=0)) == 8


def test_candidates_share_their_captions_text():
    text, _ = rows(2)
    keys = jax.random.split(jax.random.key(0), 8)
    shared = SPARSE.sample(params_of(SPARSE), text, keys)
    np.testing.assert_array_equal(shared, SPARSE.sample(params_of(SPARSE), text.repeat(4, axis=0), keys))
    with pytest.raises(ValueError, match="8 keys for 3 captions"):
        SPARSE.sample(params_of(SPARSE), rows(3)[0], keys)
    with pytest.raises(ValueError, match="leave steps out"):
        SPARSE.sample(params_of(SPARSE), text, keys, steps=4)


# -- loss ---------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(0, 5))
def loss_of(prior, params, text, tokens, key, train, valid=None):
    return prior.loss(params, text, tokens, key, train=train, valid=valid)


def nats(logits, targets):
    """Mean cross-entropy of each row, in float64."""
    logits = np.asarray(logits, np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(logp, targets[..., None], -1)[..., 0].mean(-1)


def test_loss_is_an_eighth_text_and_seven_eighths_image():
    text, tokens = rows(4)
    params = params_of(SPARSE)
    loss, scalars = loss_of(SPARSE, params, text, tokens, jax.random.key(0), False)
    text_logits, image_logits = jax.jit(SPARSE.model.apply)({"params": params}, text, tokens)
    # Text position p predicts the token at p + 1, and all padding is one class; the first token is given.
    of_text = nats(text_logits, np.minimum(text[:, 1:], 10))
    of_image = nats(image_logits, tokens)
    np.testing.assert_allclose(scalars["text_nats"], of_text.mean(), rtol=1e-5)
    np.testing.assert_allclose(scalars["image_nats"], of_image.mean(), rtol=1e-5)
    np.testing.assert_allclose(loss, of_text.mean() / 8 + of_image.mean() * 7 / 8, rtol=1e-5)

    valid = np.array([True, False, True, False])
    _, scalars = loss_of(SPARSE, params, text, tokens, jax.random.key(0), False, valid)
    np.testing.assert_allclose(scalars["text_nats"], of_text[::2].mean(), rtol=1e-5)
    np.testing.assert_allclose(scalars["image_nats"], of_image[::2].mean(), rtol=1e-5)


def test_dropped_captions():
    text, tokens = rows(4)
    other, _ = rows(4, seed=9)
    params, key = params_of(SPARSE), jax.random.key(0)
    always = dataclasses.replace(SPARSE, options=dataclasses.replace(SPARSE.options, caption_drop=1.0))
    losses = [loss_of(always, params, t, tokens, key, True) for t in (text, other)]
    assert losses[0] == losses[1], "a dropped caption must not reach the loss"
    assert losses[0][1]["text_nats"] == 0
    null = np.tile(LAYOUT.null_text(), (4, 1))
    np.testing.assert_allclose(
        losses[0][1]["image_nats"], loss_of(SPARSE, params, null, tokens, key, False)[1]["image_nats"], rtol=1e-5
    )
    measured = [loss_of(always, params, t, tokens, key, False)[0] for t in (text, other)]
    assert measured[0] != measured[1], "captions are dropped in training only"


def test_sharded_loss_equals_the_loss_on_one_device():
    prior = make({"depth": 3})
    text, tokens = rows(8)
    params, key = params_of(prior), jax.random.key(0)

    def loss(params, text, tokens):
        return prior.loss(params, text, tokens, key, train=True)[0]

    expected = jax.jit(jax.value_and_grad(loss))(params, text, tokens)
    boxed = jax.eval_shape(prior.init, key)
    for sizes in ((8, 1, 1), (2, 2, 2), (1, 4, 2)):
        mesh = parallel.make_mesh(*sizes)
        with parallel.on_mesh(mesh):
            placed = jax.device_put(params, parallel.shardings_of(boxed, mesh))
            batch = jax.device_put((text, tokens), parallel.batch_sharding(mesh))
            ours = jax.jit(jax.value_and_grad(loss))(placed, *batch)
        np.testing.assert_allclose(ours[0], expected[0], rtol=1e-5)
        for a, b in zip(jax.tree.leaves(ours[1]), jax.tree.leaves(expected[1])):
            np.testing.assert_allclose(a, b, atol=2e-5)
        if sizes[2] > 1:
            assert placed["trunk"]["layer_0"]["mlp"]["up"]["kernel"].addressable_shards[0].data.size < 16 * 64


def test_bfloat16_inside_float32_outside():
    prior = make({"dtype": "bfloat16", "depth": 9, "scan": True})
    boxed = jax.eval_shape(prior.init, jax.random.key(0))
    assert {str(x.dtype) for x in jax.tree.leaves(boxed)} == {"float32"}
    text, tokens = rows(2)

    def outputs(method):
        return jax.eval_shape(
            lambda p: prior.model.apply({"params": p}, text, tokens, method=method), nn.meta.unbox(boxed)
        )

    assert outputs("embed").dtype == jnp.bfloat16
    assert {x.dtype for x in outputs("__call__")} == {jnp.dtype("float32")}


def test_overfitting_one_batch():
    prior = make({"width": 32, "depth": 2}, caption_drop=0.0)
    text, tokens = rows(4)
    optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0.0, 1e-2, 10, 120, 1e-4))

    @jax.jit
    def train(key):
        def update(carry, step):
            params, opt_state = carry
            loss = lambda p: prior.loss(p, text, tokens, jax.random.fold_in(key, step), train=True)  # noqa: E731
            (_, scalars), grads = jax.value_and_grad(loss, has_aux=True)(params)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), scalars["image_nats"]

        params = nn.meta.unbox(prior.init(key))
        return jax.lax.scan(update, (params, optimizer.init(params)), jnp.arange(120))[1]

    image_nats = train(jax.random.key(0))
    assert image_nats[0] > 2.5 and image_nats[-1] < 0.05, image_nats[-1]


# -- golden numbers -----------------------------------------------------------------------------------------------


def test_golden_prior_update():
    golden_updates.check("prior")


# -- from a configuration -----------------------------------------------------------------------------------------


CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    "variant, billions, tolerance", [("paper", 12.0, 0.02), ("5.6b", 5.6, 0.04), ("2.8b", 2.8, 0.04)]
)
def test_published_sizes(variant, billions, tolerance):
    config = config_files.module(CONFIGS / "any", "prior.py").get_config(variant)
    layout = TokenLayout(config.text.vocab_size, config.tokenizer.model.vocab_size, config.text.length, 32, 32)
    prior = priors.make(config.prior, config.model, layout)
    shapes = jax.eval_shape(prior.init, jax.random.key(0))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert abs(count / (billions * 1e9) - 1) < tolerance, f"{count:,}"


def test_refused_configurations():
    trunk = {"width": 16, "depth": 2, "heads": 2}
    assert priors.make("autoregressive", ConfigDict({"trunk": trunk, "kernel": 3}), LAYOUT).options.kernel == 3
    with pytest.raises(ConfigError, match="config.prior is 'diffusion'; expected one of autoregressive"):
        priors.make("diffusion", {"trunk": trunk}, LAYOUT)
    with pytest.raises(ConfigError, match="model.trunk has no key 'widht' .did you mean \"width\""):
        priors.make("autoregressive", {"trunk": {"widht": 16}}, LAYOUT)
    with pytest.raises(ConfigError, match="model has no key 'kernl'"):
        priors.make("autoregressive", {"trunk": trunk, "kernl": 3}, LAYOUT)
    for changes, words in (
        ({"attention": "linear"}, "'linear'; expected one of sparse, full"),
        ({"text_weight": 1.5}, r"text_weight is 1.5; it must lie in \[0, 1\]"),
        ({"caption_drop": -0.1}, "caption_drop is -0.1"),
    ):
        with pytest.raises(ConfigError, match=words):
            priors.make("autoregressive", {"trunk": trunk, **changes}, LAYOUT)
