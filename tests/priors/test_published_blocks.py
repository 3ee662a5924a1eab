"""Options of the trunk and the priors that published models need, against plain NumPy and against each other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prior_cases import LAYOUT, PRIORS, N, T, V, autoregressive, cached_logits, changed, drawn, loss_of, maskgit, rows

from dalle_jax.aot import model_flops
from dalle_jax.errors import ConfigError
from dalle_jax.models.attention import decode_cache
from dalle_jax.models.attention.patterns import Bidirectional
from dalle_jax.models.transformer_options import TransformerOptions

BERT = dict(
    norm_placement="post", norm_epsilon=1e-12, embedding_norm=True, final_norms=0, qkv_bias=True, positions="table",
    activation="gelu_tanh",
)  # fmt: skip
COGVIEW = dict(norm_placement="sandwich", norm_epsilon=0.1, final_norms=2, qkv_bias=True, activation="gelu_tanh")
V3 = autoregressive(COGVIEW, wrap=False, head_bias=True, padding_classes=True)
V2, PUBLISHED_MASKGIT = PRIORS["shifted"], PRIORS["maskgit, published"]


# -- plain NumPy --------------------------------------------------------------------------------------------------


def normed(x, params, epsilon):
    z = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)
    return z * params["norm"]["scale"] + params["norm"]["bias"]


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def attention(x, params, mask):
    q, k, v = np.einsum("bsd,dthk->tbshk", x, params["qkv"]["kernel"]) + params["qkv"]["bias"][:, None, None]
    scores = np.where(mask, np.einsum("bqhk,blhk->bhql", q, k) / np.sqrt(q.shape[-1]), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    heads = np.einsum("bhql,blhk->bqhk", weights, v)
    return np.einsum("bqhk,hkd->bqd", heads, params["out"]["kernel"]) + params["out"]["bias"]


def mlp(x, params):
    return gelu(x @ params["up"]["kernel"] + params["up"]["bias"]) @ params["down"]["kernel"] + params["down"]["bias"]


def plain_trunk(x, params, options, masks):
    """The layers, with each placement of the norms as its paper writes it."""
    norm = lambda y, name, layer: normed(y, layer[name], options.norm_epsilon or 1e-5)
    for i, mask in enumerate(masks):
        layer = params[f"layer_{i}"]
        attend = lambda y, layer=layer, mask=mask: attention(y, layer["attention"], mask)
        if options.norm_placement == "post":
            x = norm(x + attend(x), "attention_norm", layer)
            x = norm(x + mlp(x, layer["mlp"]), "mlp_norm", layer)
        elif options.norm_placement == "sandwich":
            x = x + norm(attend(norm(x, "attention_norm", layer)), "attention_out_norm", layer)
            x = x + norm(mlp(norm(x, "mlp_norm", layer), layer["mlp"]), "mlp_out_norm", layer)
        else:
            x = x + attend(norm(x, "attention_norm", layer))
            x = x + mlp(norm(x, "mlp_norm", layer), layer["mlp"])
    for name in ("final_norm", "second_final_norm")[: options.final_norms]:
        x = norm(x, name, params)
    return x


def embedded(prior, params, text, ids):
    """Token and position embeddings of text and image, without start tokens."""
    tables = params["embedding"]
    images = np.concatenate([tables["image"], tables["mask"]]) if "mask" in tables else tables["image"]
    row, column = np.divmod(np.arange(N), LAYOUT.width)
    cells = tables["cells"] if "cells" in tables else tables["rows"][row] + tables["columns"][column]
    x = np.concatenate([tables["text"][text] + tables["text_positions"], images[ids] + cells], axis=1)
    options = prior.options.trunk
    return normed(x, tables["norm"], options.norm_epsilon) if options.embedding_norm else x


@pytest.mark.parametrize(
    "trunk",
    [BERT, {**BERT, "positions": "learned", "norm_placement": "pre", "final_norms": 1}, {**COGVIEW, "dropout": 0.0}],
    ids=["post", "pre", "sandwich"],
)
def test_blocks_are_those_of_the_papers(trunk):
    prior = autoregressive(trunk, wrap=False, head_bias=True, padding_classes=True)
    params, (text, tokens) = drawn(prior), rows(3)
    masks = [pattern.mask(LAYOUT) for pattern in prior.options.patterns]
    x = plain_trunk(embedded(prior, params, text, tokens), params["trunk"], prior.options.trunk, masks)
    tables = params["embedding"]
    text_logits = x[:, : T - 1] @ tables["text_head_kernel"].T + tables["text_head_bias"]
    image_logits = x[:, T - 1 : -1] @ tables["image_head_kernel"].T + tables["image_head_bias"]
    ours = jax.jit(prior.model.apply)({"params": params}, text, tokens)
    assert ours[0].shape[-1] == LAYOUT.condition.ids
    np.testing.assert_allclose(ours[0], text_logits, atol=1e-4)
    np.testing.assert_allclose(ours[1], image_logits, atol=1e-4)
    assert np.abs(image_logits).max() > 1


def published_maskgit_logits(prior, params, text, ids):
    x = embedded(prior, params, text, ids)
    x = plain_trunk(x, params["trunk"], prior.options.trunk, [np.ones((T + N,) * 2, bool)] * 2)[:, T:]
    head = params["head"]
    x = normed(gelu(x @ head["kernel"] + head["bias"]), params["head_norm"], 1e-12)
    return x @ params["embedding"]["image"].T + params["image_bias"]


def test_maskgit_as_published():
    """Post-norm blocks, the tanh approximation in trunk and head, and a text that reads the image."""
    prior = PUBLISHED_MASKGIT
    params, (text, ids) = drawn(prior), rows(4)
    ids = np.where(np.random.default_rng(1).random(ids.shape) < 0.5, LAYOUT.mask_id, ids)
    apply = jax.jit(prior.model.apply, static_argnames="method")
    expected = published_maskgit_logits(prior, params, text, ids)
    np.testing.assert_allclose(apply({"params": params}, text, ids), expected, atol=1e-4)
    # Four candidates of two captions, in a decoding step.
    captions = text[:2]
    stepwise = apply({"params": params}, ids, apply({"params": params}, captions, method="prefill"), method="refine")
    expected = published_maskgit_logits(prior, params, captions.repeat(2, axis=0), ids)
    np.testing.assert_allclose(stepwise, expected, atol=1e-4)
    exact = changed(prior, head_activation="gelu")
    assert np.abs(exact.model.apply({"params": params}, text, ids) - apply({"params": params}, text, ids)).max() > 1e-5


# -- decoding -----------------------------------------------------------------------------------------------------


def stepped(prior, params, text, tokens):
    """Image logits from `start` and `step`: [B, N, V]."""
    bound = lambda method: lambda params, *args: prior.model.apply({"params": params}, *args, method=method)
    logits, kv, caches = jax.jit(bound("start"), static_argnums=2)(params, text, len(tokens))
    found, step = [logits], jax.jit(bound("step"))
    for place in range(N - 1):
        cells = [jnp.full(len(tokens), cell) for cell in (place, place + 1)]
        logits, caches = step(params, tokens[:, place], place, *cells, kv, caches)
        found.append(logits)
    return np.stack(found, axis=1)


@pytest.mark.parametrize("prior", [V3, V2, changed(V3, BERT)], ids=["v3", "v2", "post"])
def test_cached_decoding_equals_the_whole_stream(prior):
    params, (text, tokens) = drawn(prior), rows(4)
    captions = text[:2]
    whole = jax.jit(prior.model.apply)({"params": params}, captions.repeat(2, axis=0), tokens)[1]
    np.testing.assert_allclose(stepped(prior, params, captions, tokens), whole, atol=1e-4)
    if not prior.options.shifted:
        np.testing.assert_allclose(cached_logits(prior, params, captions, tokens), whole, atol=1e-4)


@pytest.mark.parametrize("trunk", [BERT, COGVIEW], ids=["post", "sandwich"])
def test_groups_of_one_token_are_draws_one_by_one(trunk):
    prior = autoregressive(trunk, attention="full", order="random", head_bias=True)
    params, keys = drawn(prior), jax.random.split(jax.random.key(0), 4)
    text, _ = rows(2)
    one_by_one = prior.sample(params, text, keys, order="halton")
    np.testing.assert_array_equal(prior.sample(params, text, keys, order="halton", steps=N), one_by_one)


@pytest.mark.parametrize("prior", [V3, V2], ids=["v3", "v2"])
def test_greedy_draws_are_the_most_likely_tokens(prior, monkeypatch):
    """Also if caches grow. Those of a shifted stream do from its second position on."""
    params, keys = drawn(prior), jax.random.split(jax.random.key(1), 4)
    text, _ = rows(2)

    def check():
        jax.clear_caches()  # the constants are not part of the key of a compiled program
        tokens = np.asarray(prior.sample(params, text, keys, temperature=0.0))
        logits = prior.model.apply({"params": params}, text.repeat(2, axis=0), tokens)[1]
        np.testing.assert_array_equal(tokens, logits.argmax(-1))

    check()
    monkeypatch.setattr(decode_cache, "_SHORT", 8)
    check()
    jax.clear_caches()


# -- the shifted stream -------------------------------------------------------------------------------------------


def test_positions_of_a_shifted_stream_have_the_patterns_of_their_predictions():
    """Start-of-text, text, and all image tokens but the last, under the masks of the unshifted stream."""
    params, (text, tokens) = drawn(V2), rows(3)
    tables = params["embedding"]
    x = embedded(V2, params, text, tokens)[:, :-1]
    x = np.concatenate([np.broadcast_to(tables["start_of_text"], (3, 1, 16)), x], axis=1)
    masks = [pattern.mask(LAYOUT) for pattern in V2.options.patterns]
    x = plain_trunk(x, params["trunk"], V2.options.trunk, masks)
    ours = jax.jit(V2.model.apply)({"params": params}, text, tokens)
    expected = x[:, :T] @ tables["text_head_kernel"].T + tables["text_head_bias"]
    np.testing.assert_allclose(ours[0], expected, atol=1e-4)
    expected = x[:, T:] @ tables["image_head_kernel"].T + tables["image_head_bias"]
    np.testing.assert_allclose(ours[1], expected, atol=1e-4)


def test_classes_of_padding():
    """Each padding id is a class; the loss counts the ids as they are."""
    params, (text, tokens) = drawn(V2), rows(3)
    text_logits, _ = V2.model.apply({"params": params}, text, tokens)
    assert text.max() > LAYOUT.condition.vocab  # more than one kind of padding
    nats = -np.take_along_axis(np.asarray(jax.nn.log_softmax(text_logits)), text[..., None], axis=-1).mean()
    _, scalars = loss_of(V2, params, text, tokens, jax.random.key(0), False)
    np.testing.assert_allclose(scalars["text_nats"], nats, rtol=1e-5)


# -- options ------------------------------------------------------------------------------------------------------


def test_a_text_that_reads_the_image_is_computed_in_every_step():
    reads, apart = PUBLISHED_MASKGIT, changed(PUBLISHED_MASKGIT, text_reads_image=False)
    layer = 2 * (4 * 16 * 16 + 2 * 16 * 64)  # of one position, without attention
    text = 2 * (T * layer + 4 * 16 * T * T)  # two layers of the text alone
    extra = model_flops.sampling(reads, 1) - model_flops.sampling(apart, 1)
    assert extra == 3 * text + 4 * 2 * 4 * 16 * T * N  # three more of four steps, and pairs of text and image in all
    assert Bidirectional(True).mask(LAYOUT).all()


@pytest.mark.parametrize(
    "kind, changes, token",
    [
        (autoregressive, dict(torus=True), "wrap"),
        (autoregressive, dict(torus=True, wrap=False, attention="full"), "attention"),
        (autoregressive, dict(shifted=True, start_tokens=True), "start_tokens"),
        (autoregressive, dict(shifted=True, order="random", attention="full"), "order"),
        (maskgit, dict(head_activation="relu"), "head_activation"),
        (TransformerOptions, dict(norm_placement="around"), "norm_placement"),
        (TransformerOptions, dict(norm_epsilon=-1e-5), "norm_epsilon"),
        (TransformerOptions, dict(final_norms=3), "final_norms"),
    ],
)
def test_invalid_options(kind, changes, token):
    with pytest.raises(ConfigError, match=token):
        kind(**changes)


def test_defaults_add_no_parameter():
    """Older checkpoints keep their names and shapes."""
    for name in ("autoregressive", "maskgit"):
        tree = jax.eval_shape(PRIORS[name].init, jax.random.key(0))
        assert set(tree["trunk"]["layer_0"]["attention"]["qkv"]) == {"kernel"}
        assert set(tree["trunk"]["layer_0"]) == {"attention_norm", "attention", "mlp_norm", "mlp"}
        assert not {"norm", "cells", "image_head_bias", "text_head_bias"} & set(tree["embedding"])
    assert dataclasses.replace(PRIORS["maskgit"].options) == PRIORS["maskgit"].options and V == LAYOUT.image_vocab
