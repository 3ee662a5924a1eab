"""Properties of every `Condition` with every kind of prior: one suite over both."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from prior_cases import LAYOUT, N, V, cached_logits, changed, drawn, loss_of, trunk_of

from dalle_jax.distributed.mesh import make_mesh
from dalle_jax.distributed.rows import over_rows
from dalle_jax.distributed.sharding import batch_sharding, on_mesh, shardings_of
from dalle_jax.errors import ConfigError
from dalle_jax.models.cross_attention import Memory
from dalle_jax.priors import sampling
from dalle_jax.priors.autoregressive import AutoregressiveOptions, AutoregressivePrior
from dalle_jax.priors.clip_condition import ClipEmbedding
from dalle_jax.priors.condition import KEY, Label, Nothing, Text, blank, with_empty
from dalle_jax.priors.losses import training_conditions
from dalle_jax.priors.low_resolution import LowResolution
from dalle_jax.priors.maskgit import MaskGITPrior
from dalle_jax.priors.maskgit_model import MaskGITOptions
from dalle_jax.priors.registry import CONDITIONS
from dalle_jax.token_layout import TokenLayout

SIZES = {Text: Text(10, 4), Label: Label(7), Nothing: Nothing(), ClipEmbedding: ClipEmbedding(6)}
SIZES[LowResolution] = LowResolution(Text(10, 3), 5, 2, 2)
KINDS = {
    "autoregressive": lambda layout: AutoregressivePrior(layout, AutoregressiveOptions(trunk_of(), kernel=3)),
    "start tokens": lambda layout: AutoregressivePrior(
        layout, AutoregressiveOptions(trunk_of(), kernel=3, start_tokens=True, tied_embeddings=True, head_bias=True)
    ),
    "any order": lambda layout: AutoregressivePrior(
        layout, AutoregressiveOptions(trunk_of(), attention="full", order="random")
    ),
    "maskgit": lambda layout: MaskGITPrior(layout, MaskGITOptions(trunk_of(), steps=4)),
    "encoder": lambda layout: AutoregressivePrior(
        layout, AutoregressiveOptions(trunk_of(), kernel=3, encoder_depth=1, encoder_padding=1)
    ),
    "any order, encoder": lambda layout: AutoregressivePrior(
        layout, AutoregressiveOptions(trunk_of(), attention="full", order="random", encoder_depth=1)
    ),
    "maskgit, encoder": lambda layout: MaskGITPrior(layout, MaskGITOptions(trunk_of(), steps=4, encoder_depth=2)),
    "maskgit, class reads image": lambda layout: MaskGITPrior(
        layout, MaskGITOptions(trunk_of(), steps=4, text_reads_image=True)
    ),
}
PRIORS = ("autoregressive", "maskgit")
# Attention to a single position is a sum, so that encoders are tested with longer conditions.
ENCODERS = {"encoder": [Text], "any order, encoder": [Text], "maskgit, encoder": [Text, LowResolution]}


@functools.cache
def make(kind, condition):
    prior = KINDS[kind](TokenLayout(SIZES[condition], V, LAYOUT.height, LAYOUT.width))
    return prior, drawn(prior)


def parametrized(fast):
    """Both priors with every condition, and their variants with some; only the conditions of `fast` are not slow."""
    short = [each for each in CONDITIONS.values() if each is not LowResolution]
    given = {kind: short if kind in PRIORS else ENCODERS.get(kind, [Label]) for kind in KINDS}
    return pytest.mark.parametrize(
        "kind, condition",
        [
            pytest.param(
                kind,
                each,
                id=f"{kind}-{each.name}",
                marks=[pytest.mark.slow] * (kind not in (*PRIORS, "encoder") or each not in fast),
            )
            for kind, conditions in given.items()
            for each in conditions
        ],
    )


every = parametrized((Label, ClipEmbedding, Nothing))  # other tests of priors have captions
with_labels = parametrized((Label,))


def rows(condition, count, seed=0):
    """Random conditions, [count, ...], no two of which are equal where there are as many."""
    rng, given = np.random.default_rng(seed), SIZES[condition]
    if condition is Nothing:
        return np.tile(given.empty(), (count, 1))
    if condition is ClipEmbedding:
        vectors = rng.normal(size=(count, given.width))
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    if condition is Label:
        return rng.permutation(given.vocab)[np.arange(count) % given.vocab][:, None].astype(np.int32)
    words = SIZES[LowResolution].text if condition is LowResolution else given
    text = np.stack([words.pad(rng.integers(0, words.vocab, 1 + i % words.length)) for i in range(count)])
    if condition is Text:
        return text
    return np.concatenate([text, rng.integers(0, given.vocab, (count, given.cells), dtype=np.int32)], axis=1)


def tokens_of(count, seed=0):
    return np.random.default_rng(seed).integers(0, V, (count, N), dtype=np.int32)


def test_every_condition_is_tested():
    assert set(SIZES) == set(CONDITIONS.values())


@pytest.mark.parametrize("condition", CONDITIONS.values(), ids=lambda condition: condition.name)
def test_rows(condition):
    """The empty row, a blank one, and rows of a batch have one shape and dtype; the empty one is no other row."""
    given = SIZES[condition]
    batch = {"text": rows(condition, 3), "index": np.arange(3, dtype=np.int32), KEY: rows(condition, 3)}
    if condition is LowResolution:
        batch["text"] = batch["text"][:, : given.text.length]
    found, empty = np.asarray(given.of_batch(batch)), given.empty()
    assert found.shape[1:] == empty.shape == blank(given).shape[1:] and found.dtype == empty.dtype
    mixed = np.asarray(with_empty(given, found, np.array([True, False, True])))
    np.testing.assert_array_equal(mixed, np.stack([empty, found[1], empty]))
    assert condition is Nothing or not (found == empty).all(-1).any()
    assert condition not in (Text, Label) or (empty >= given.vocab).all(), "no id of a caption or class"
    assert hash(given) == hash(SIZES[condition]) and given.length >= 1


@every
def test_the_image_depends_on_the_condition_and_on_nothing_later(kind, condition):
    """Gradients of each logit: all image tokens see the condition; a causal prior sees no later token."""
    prior, params = make(kind, condition)
    given, tokens = rows(condition, 1), tokens_of(1)
    cells = np.arange(N, dtype=np.int32)[None] if kind.startswith("any order") else None

    @jax.jit
    def gradients(params):
        embed = functools.partial(prior.model.apply, {"params": params})
        if prior.name == "maskgit":
            text = prefix = embed(given, method=lambda m, x: m.embedding.text(x))
            image = embed(tokens, method=lambda m, x: m.embedding.image(x))
        else:
            both = embed(given, tokens, False, cells, method="embed")
            prefix, image = jnp.split(both, [prior.stream.prefix_length], axis=1)
            text = prefix
        if prior.options.encoder_depth:
            text = embed(given, method=lambda m, x: m.embedding.text(x))
            start = embed(given, method=lambda m, x: m.embedding.start_of_image(len(x)))
            prefix = start if prior.name == "maskgit" else prefix

        def logits(text, image):  # of embeddings: both kinds of prior build them from these two
            def model(m):
                memory, before = None, text
                if prior.options.encoder_depth:
                    visible = jnp.ones(text.shape[:2], bool)
                    memory, before = Memory(m.encoder(text, False, visible=visible)), prefix
                stream = jnp.concatenate([before, image], axis=1)
                if prior.name == "maskgit":
                    return m.logits(m.trunk(stream, False, memory)[:, prior.stream.prefix_length :])
                return m.logits(stream, False, memory)[1]

            return prior.model.apply({"params": params}, method=model)

        weights = jax.random.normal(jax.random.key(0), (N, 1, N, V))
        found, back = jax.vjp(logits, text, image)
        assert found.shape == (1, N, V)
        one = lambda i: back(jnp.where(jnp.arange(N)[None, :, None] == i, weights[i], 0))
        return jax.vmap(one)(jnp.arange(N))

    of_text, of_image = (np.any(np.asarray(x)[:, 0] != 0, axis=-1) for x in gradients(params))
    assert of_text.all(), "every image token sees every position of the condition"
    places = np.arange(N)
    if prior.name == "maskgit":
        assert of_image.all()
    else:  # the logits of a token are computed from the position before it
        assert not of_image[places[:, None] <= places[None]].any() and of_image[1:].any(1).all()


@every
def test_cached_decoding_equals_the_full_forward(kind, condition):
    """Two candidates share each condition. The second half are empty conditions, as in guidance."""
    prior, params = make(kind, condition)
    given = np.concatenate([rows(condition, 2), np.tile(SIZES[condition].empty(), (2, 1))])
    tokens = tokens_of(8)
    each = given.repeat(2, axis=0)
    if prior.name == "maskgit":
        masked = np.where(np.random.default_rng(1).random((8, N)) < 0.5, prior.layout.mask_id, tokens)
        bound = lambda params, *args, **how: prior.model.apply({"params": params}, *args, **how)
        refined = jax.jit(lambda p: bound(p, masked, bound(p, given, method="prefill"), method="refine"))(params)
        expected = jax.jit(lambda p: bound(p, each, masked))(params)
    else:
        cells = np.tile(np.arange(N, dtype=np.int32), (8, 1)) if kind.startswith("any order") else None
        refined = cached_logits(prior, params, given, tokens)
        expected = jax.jit(lambda p: prior.model.apply({"params": p}, each, tokens, cells=cells))(params)[1]
    np.testing.assert_allclose(refined, expected, atol=2e-4)
    differ = np.abs(np.asarray(expected)[0] - np.asarray(expected)[-1]).max()
    assert differ > 1e-3, "other tokens have other logits"


@every
def test_guidance_leads_away_from_the_empty_condition(kind, condition):
    prior, params = make(kind, condition)
    given, keys = rows(condition, 3), jax.random.split(jax.random.key(0), 3)
    draw = lambda **knobs: np.asarray(prior.sample(params, given, keys, temperature=0.0, **knobs))
    if condition is Nothing:
        with pytest.raises(ConfigError, match=r"guidance=2\.0"):
            prior.check_sampling(sampling.SamplingOptions(guidance=2.0))
        return
    empty = SIZES[condition].empty()[None]
    knobs = sampling.knobs(prior.layout, given, keys, sampling.SamplingOptions(guidance=2.0))
    np.testing.assert_array_equal(knobs["negative"], np.tile(empty, (3, 1)))
    np.testing.assert_array_equal(draw(guidance=2.0), draw(guidance=2.0, negative=empty))
    np.testing.assert_array_equal(draw(guidance=2.0, negative=given), draw())  # (1 + s)·l - s·l
    assert (draw(guidance=2.0) != draw()).any()


@with_labels
@pytest.mark.parametrize("rate", [0.0, 0.25, 1.0])
def test_dropping_rates(kind, condition, rate):
    """The loss of training is that of conditions of which this share is empty; evaluation drops none."""
    prior, params = make(kind, condition)
    dropping = changed(prior, caption_drop=rate)
    given, tokens, other = rows(condition, 6), tokens_of(6), rows(condition, 6, seed=5)
    key = jax.random.key(3)
    changes = (
        loss_of(dropping, params, given, tokens, key, True)[0] != loss_of(dropping, params, other, tokens, key, True)[0]
    )
    assert changes == (rate < 1 and condition is not Nothing)
    if rate == 1:
        measured = [loss_of(dropping, params, each, tokens, key, False)[0] for each in (given, other)]
        assert (measured[0] != measured[1]) == (condition is not Nothing)


@with_labels
def test_a_sample_depends_on_its_own_key_only(kind, condition):
    """Tokens are equal at batch 1, at batch 8 and on eight devices, with sharded parameters."""
    prior, params = make(kind, condition)
    given, keys = rows(condition, 8), jax.random.split(jax.random.key(0), 8)
    together = np.asarray(prior.sample(params, given, keys))
    for i in (0, 7):
        np.testing.assert_array_equal(prior.sample(params, given[i : i + 1], keys[i : i + 1])[0], together[i])
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    layouts = shardings_of(jax.eval_shape(prior.init, jax.random.key(0)), mesh)
    draw = functools.partial(prior.sample, jax.device_put(params, layouts))
    np.testing.assert_array_equal(over_rows(mesh, draw, given, keys), together)
    assert len(np.unique(together, axis=0)) == 8 and 0 <= together.min() and together.max() < V


@with_labels
def test_sharded_loss_equals_the_loss_on_one_device(kind, condition):
    prior, params = make(kind, condition)
    given, tokens, key = rows(condition, 8), tokens_of(8), jax.random.key(0)
    loss = lambda params, given, tokens: prior.loss(params, given, tokens, key, train=True)[0]  # noqa: E731
    expected = jax.jit(jax.value_and_grad(loss))(params, given, tokens)
    mesh = make_mesh(2, 2, 2)
    with on_mesh(mesh):
        placed = jax.device_put(params, shardings_of(jax.eval_shape(prior.init, key), mesh))
        ours = jax.jit(jax.value_and_grad(loss))(placed, *jax.device_put((given, tokens), batch_sharding(mesh)))
    np.testing.assert_allclose(ours[0], expected[0], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(ours[1]), jax.tree.leaves(expected[1])):
        np.testing.assert_allclose(a, b, atol=2e-5)


@every
def test_only_captions_are_predicted(kind, condition):
    """The loss is that of the image alone, except with captions, and every parameter gets a gradient."""
    prior, params = make(kind, condition)
    given = np.concatenate([rows(condition, 7), SIZES[condition].empty()[None]])
    loss = lambda params: prior.loss(params, given, tokens_of(8), jax.random.key(0), train=True)  # noqa: E731
    (value, scalars), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    predicted = prior.name == "autoregressive" and condition is Text and not prior.options.encoder_depth
    assert ("text_nats" in scalars) == predicted
    if "text_nats" not in scalars and prior.name == "autoregressive":
        assert value == scalars["image_nats"]
    for part in ("embedding", "encoder", "trunk"):
        leaves = jax.tree.leaves(nn.meta.unbox(grads).get(part, {}))
        assert all(np.abs(x).max() > 0 for x in leaves), "no parameter is unused"


@with_labels
def test_a_condition_is_learned(kind, condition):
    """Greedy samples are the images of their conditions after a short training, or one of them without conditions."""
    prior = changed(make(kind, condition)[0], {"width": 32}, caption_drop=0.0)
    if prior.name == "maskgit":
        prior = changed(prior, label_smoothing=0.0)
    given, tokens = rows(condition, 4), tokens_of(4)
    if condition is Nothing:
        tokens[:] = tokens[0]
    optimizer, steps = optax.adam(optax.warmup_cosine_decay_schedule(0.0, 6e-3, 10, 250, 1e-4)), 250

    @jax.jit
    def train(key):
        def update(carry, step):
            params, state = carry
            loss = lambda p: prior.loss(p, given, tokens, jax.random.fold_in(key, step), train=True)[0]  # noqa: E731
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        params = nn.meta.unbox(prior.init(key))
        return jax.lax.scan(update, (params, optimizer.init(params)), jnp.arange(steps))[0][0]

    params, keys = train(jax.random.key(0)), jax.random.split(jax.random.key(1), 4)
    drawn_tokens = prior.sample(params, given, keys, temperature=0.0)
    assert (np.asarray(drawn_tokens) == tokens).mean() > 0.9


@pytest.mark.parametrize("kind", ["autoregressive", "maskgit"])
def test_hidden_padding(kind):
    """With `encoder_padding`, the padding of later positions has no influence, and that of the first ones has."""
    condition, options = SIZES[Text], dict(encoder_depth=1, encoder_padding=2)
    layout = TokenLayout(condition, V, LAYOUT.height, LAYOUT.width)
    if kind == "maskgit":
        prior = MaskGITPrior(layout, MaskGITOptions(trunk_of(), **options))
    else:
        prior = AutoregressivePrior(layout, AutoregressiveOptions(trunk_of(), kernel=3, **options))
    params, given = drawn(prior), np.stack([condition.pad([3]), condition.empty()])

    @jax.jit
    def gradients(params):
        def total(params):
            logits = prior.model.apply({"params": params}, given, tokens_of(2))
            return jnp.sin(logits[1] if prior.name == "autoregressive" else logits).sum()

        return jax.grad(total)(params)["embedding"]

    grads = gradients(params)
    ids = np.abs(np.asarray(grads["text"])).max(1) > 0
    assert ids.tolist() == [i in (3, 10, 11) for i in range(condition.ids)]
    assert (np.abs(np.asarray(grads["text_positions"])).max(1) > 0).tolist() == [True, True, False, False]


def test_noise_on_embeddings():
    """Training rotates each unit vector by a random angle, whose tangent is at most the noise; drawing does not."""
    noisy, given = ClipEmbedding(256, noise=0.4), np.asarray(rows_of_units(64, 256))
    varied = np.asarray(noisy.vary(jax.random.key(0), given))
    cosines = (varied * given).sum(-1)
    np.testing.assert_allclose(np.linalg.norm(varied, axis=-1), 1, rtol=1e-5)
    assert np.mean(cosines) == pytest.approx(1 / np.sqrt(1 + 0.4**2), abs=0.02)
    assert ClipEmbedding(256).vary(jax.random.key(0), given) is given
    varied, dropped = training_conditions(jax.random.key(1), jnp.asarray(given), 0.5, noisy)
    kept = ~np.asarray(dropped)
    assert 0 < kept.sum() < 64 and (np.asarray(varied)[~kept] == 0).all()
    assert (np.abs(np.asarray(varied) - given)[kept].max(-1) > 1e-3).all()


def rows_of_units(count, width):
    values = np.random.default_rng(0).normal(size=(count, width)).astype(np.float32)
    return values / np.linalg.norm(values, axis=-1, keepdims=True)
