"""The MaskGIT prior: its attention, its loss, and its decoding against a numpy implementation."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prior_cases import LAYOUT, N, T, V, changed, loss_of, maskgit, params_of, rows, trunk_of

from dalle_jax.errors import ConfigError
from dalle_jax.priors import sampling
from dalle_jax.priors.condition import Text
from dalle_jax.priors.maskgit import MaskGITPrior
from dalle_jax.priors.maskgit_model import MaskGITModel, MaskGITOptions
from dalle_jax.priors.registry import make
from dalle_jax.token_layout import TokenLayout

PRIOR = maskgit()
MASK = LAYOUT.mask_id


# -- attention ----------------------------------------------------------------------------------------------------


def test_image_depends_on_everything_and_text_on_text():
    params, (text, tokens) = params_of(PRIOR), rows(1)
    bound = {"params": params}
    parts = [
        PRIOR.model.apply(bound, text, method=lambda model, x: model.embedding.text(x)),
        PRIOR.model.apply(bound, tokens, method=lambda model, x: model.embedding.image(x)),
    ]
    states = lambda x: PRIOR.model.apply(bound, x, method=lambda model, x: model.trunk(x, False))[0].sum(-1)
    jacobian = jax.jit(jax.jacobian(states))(jnp.concatenate(parts, axis=1))
    depends = np.any(np.asarray(jacobian)[:, 0] != 0, axis=-1)  # [position, position that it depends on]
    assert depends[T:].all(), "image positions depend on everything"
    assert depends[:T, :T].all() and not depends[:T, T:].any(), "text positions depend on the text only"


def test_refining_with_cached_text_equals_the_full_forward():
    """There are two candidates per caption, and the text is computed once per caption."""
    text, tokens = rows(2)
    ids = np.where(np.random.default_rng(0).random((4, N)) < 0.5, MASK, np.tile(tokens, (2, 1)))
    params = params_of(PRIOR)

    @jax.jit
    def refined(params):
        cache = PRIOR.model.apply({"params": params}, text, method="prefill")
        return PRIOR.model.apply({"params": params}, ids, cache, method="refine")

    expected = jax.jit(PRIOR.model.apply)({"params": params}, text.repeat(2, axis=0), ids)
    np.testing.assert_allclose(refined(params), expected, atol=1e-4)
    assert np.asarray(expected).std() > 0.3


def test_neighbours_are_a_depthwise_convolution_added_to_the_token():
    """The sum equals lax's grouped convolution of token embeddings without positions."""
    prior = changed(PRIOR, neighbour_kernel=3)
    params, ids = params_of(prior), rows(2)[1]
    table, kernel = (params["embedding"][name] for name in ("image", "neighbours_kernel"))
    grid = table[ids].reshape(2, LAYOUT.height, LAYOUT.width, -1)
    mixed = jax.lax.conv_general_dilated(
        grid, kernel[:, :, None], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=grid.shape[-1],
    )  # fmt: skip
    ours = prior.model.apply({"params": params}, ids, method=lambda model, x: model.embedding.image_tokens(x))
    np.testing.assert_allclose(ours, (grid + mixed).reshape(ours.shape), atol=1e-5)


def test_linear_head_is_one_product():
    prior = changed(PRIOR, head="linear", tied_embeddings=False)
    params, states = params_of(prior), jax.random.normal(jax.random.key(0), (2, N, 16))
    logits = prior.model.apply({"params": params}, states, method=lambda model, x: model.logits(x))
    expected = states @ params["embedding"]["image_head_kernel"].T + params["image_bias"][None, None]
    np.testing.assert_allclose(logits, expected, atol=1e-5)


# -- loss ---------------------------------------------------------------------------------------------------------


def spied(prior, key, train=True, count=8):
    """Returns the ids that the loss feeds to the model, and the tokens."""
    (text, tokens), params = rows(count), params_of(prior)
    seen = []
    original = MaskGITModel.__call__

    def spy(self, text, ids, train=False):
        seen.append(ids)
        return original(self, text, ids, train)

    MaskGITModel.__call__ = spy
    try:
        prior.loss(params, text, tokens, key, train=train)
    finally:
        MaskGITModel.__call__ = original
    return np.asarray(seen[0]), tokens


def test_rows_have_different_masks():
    ids, tokens = spied(PRIOR, jax.random.key(0), count=64)
    masked = ids == MASK
    np.testing.assert_array_equal(ids[~masked], tokens[~masked])
    assert masked.any(1).all() and len(np.unique(masked, axis=0)) > 40
    assert len(np.unique(masked.sum(1))) > 8
    assert (masked[:8] != masked[8:16]).any(), "two devices of eight rows"
    other, _ = spied(PRIOR, jax.random.key(1), count=64)
    assert (other != ids).any()
    evaluated, _ = spied(PRIOR, jax.random.key(0), train=False, count=64)
    shares = np.sort((evaluated == MASK).mean(1))
    assert shares[0] <= 1 / N and shares[-1] >= 1 - 1 / N, "evaluation covers all ratios evenly"


def test_few_valid_rows_cover_all_mask_ratios():
    """In evaluation: each of as many equal intervals as there are valid rows holds one ratio, wherever the rows are."""
    prior, valid = maskgit(), np.zeros(64, bool)
    valid[[3, 17, 18, 40, 63]] = True
    ratios = prior.mask_ratios(jax.random.key(0), 64, train=False, valid=valid)
    assert np.floor(5 * ratios[valid]).tolist() == [0, 1, 2, 3, 4] and (0 <= ratios).all()
    everyone = np.ones(64, bool)
    whole = prior.mask_ratios(jax.random.key(0), 64, train=False)
    np.testing.assert_array_equal(prior.mask_ratios(jax.random.key(0), 64, train=False, valid=everyone), whole)


@pytest.mark.parametrize("weight, average", [(0.0, "tokens"), (0.25, "tokens"), (0.0, "images"), (0.25, "images")])
def test_loss_against_numpy(weight, average):
    prior = changed(PRIOR, unmasked_weight=weight, label_smoothing=0.1, loss_average=average)
    key = jax.random.key(3)
    ids, tokens = spied(prior, key, train=False)
    text, _ = rows(8)
    logits = np.asarray(prior.model.apply({"params": params_of(prior)}, text, ids), np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = -np.take_along_axis(logp, tokens[..., None], -1)[..., 0]
    masked = ids == MASK
    weights = np.where(masked, 1.0, weight)
    smooth = 0.9 * nats - 0.1 * logp.mean(-1)
    loss, scalars = loss_of(prior, params_of(prior), text, tokens, key, False)
    expected = (smooth * weights).sum() / weights.sum()
    if average == "images":
        assert abs(expected - ((smooth * weights).sum(1) / weights.sum(1)).mean()) > 1e-3, "the two differ"
        expected = ((smooth * weights).sum(1) / weights.sum(1)).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(scalars["image_nats"], nats[masked].mean(), rtol=1e-5)
    np.testing.assert_allclose(scalars["image_accuracy"], (logits.argmax(-1) == tokens)[masked].mean(), rtol=1e-5)
    share = masked.mean(1)
    for low in (0, 25, 50, 75):
        inside = (share > low / 100) & (share <= low / 100 + 0.25)
        expected = nats[inside][masked[inside]].mean() if inside.any() else np.nan
        np.testing.assert_allclose(scalars[f"image_nats_masked_{low}_{low + 25}"], expected, rtol=1e-5)


def test_rows_of_padding_have_no_weight_in_the_average_over_images():
    prior, (text, tokens), key = changed(PRIOR, loss_average="images", caption_drop=0.0), rows(4), jax.random.key(0)
    valid = np.array([True, False, True, True])
    garbled = np.where(valid[:, None], tokens, (tokens + 1) % V)
    loss = lambda tokens: loss_of(prior, params_of(prior), text, tokens, key, True, valid)[0]
    assert loss(tokens) == loss(garbled) and abs(loss(tokens) - loss((tokens + 1) % V)) > 1e-3
    whole = loss_of(prior, params_of(prior), text, tokens, key, True, np.ones(4, bool))[0]
    assert abs(loss(tokens) - whole) > 1e-3


# -- initialisation and defaults ----------------------------------------------------------------------------------


def test_the_references_initialisation():
    """Kernels and tables: a normal of 0.02, cut at two deviations. Gains stay 1 and biases 0, boxes as they are."""
    prior = changed(maskgit({"width": 32, "scan": True}), init_scale=0.02, embedding_scale=1.0)
    boxed = jax.jit(prior.init)(jax.random.key(0))
    default = jax.eval_shape(changed(prior, init_scale=0.0).init, jax.random.key(0))
    assert jax.tree.structure(boxed) == jax.tree.structure(default)
    drawn = []
    for path, leaf in jax.tree.leaves_with_path(nn.meta.unbox(boxed)):
        name = jax.tree_util.keystr(path)
        if name.endswith(("scale']", "bias']")):
            np.testing.assert_array_equal(leaf, float("scale" in name), err_msg=name)
        else:
            assert 0 < np.abs(leaf).max() <= 0.04, name
            drawn.append(leaf.ravel())
    values = np.concatenate(drawn)
    assert len(np.unique(values)) > 0.99 * len(values), "each parameter has its own numbers"
    assert values.std() == pytest.approx(0.02 * 0.8796, rel=0.02), "of a normal cut at two deviations"


@pytest.mark.parametrize("side, expected", [(8, 8), (16, 8), (17, 12), (32, 12)])
def test_the_papers_steps_follow_the_number_of_tokens(side, expected):
    prior = MaskGITPrior(dataclasses.replace(LAYOUT, height=side, width=side), MaskGITOptions(steps=None))
    assert prior.decoding_steps(None) == expected and prior.decoding_steps(5) == 5
    assert changed(prior, steps=18).decoding_steps(None) == 18


def test_masked_tokens_have_no_effect():
    """The embedding of a token that occurs only under masks has no gradient."""
    key = jax.random.key(0)
    # Untied, so that the image embedding is only an input.
    untied = changed(PRIOR, tied_embeddings=False)
    ids, tokens = spied(untied, key, count=2)
    text, _ = rows(2)
    grads = jax.jit(jax.grad(lambda p: untied.loss(p, text, tokens, key, train=True)[0]))(params_of(untied))
    touched = np.flatnonzero(np.any(np.asarray(grads["embedding"]["image"]) != 0, axis=1))
    np.testing.assert_array_equal(touched, np.unique(ids[ids != MASK]))
    assert np.any(np.asarray(grads["embedding"]["mask"]) != 0)
    assert set(np.unique(tokens)) - set(touched), "a token that occurs only under masks"


# -- decoding -----------------------------------------------------------------------------------------------------


def numpy_decode(logits_of, steps, token_noise, choice_noise, ids, tau=4.5, guidance=None):
    """MaskGIT's decoding, one row and one position at a time. ids: int [B, N], MASK where unknown."""
    ids = ids.copy()
    at_start = [(row == MASK).sum() for row in ids]
    for t in range(steps):
        ratio = (t + 1) / steps
        logits = logits_of(ids, ratio)
        for b, row in enumerate(ids):
            unknown = [i for i in range(N) if row[i] == MASK]
            if not unknown:
                continue
            drawn, confidence = {}, {}
            for i in unknown:
                z = logits[b, i].astype(np.float64)
                reached = np.cumsum(np.exp(z))
                drawn[i] = int(np.searchsorted(reached, token_noise[t][b, i] * reached[-1], side="right"))
                logp = z[drawn[i]] - np.log(np.exp(z).sum())
                confidence[i] = logp + tau * (1 - ratio) * choice_noise[t][b, i]
            left = max(1, min(len(unknown) - 1, int(np.floor(at_start[b] * np.cos(np.pi * ratio / 2) + 1e-3))))
            if t == steps - 1:
                left = 0
            again = sorted(unknown, key=lambda i: (confidence[i], i))[:left]
            for i in unknown:
                row[i] = MASK if i in again else drawn[i]
    return ids


@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_decoding_agrees_with_a_numpy_decoder(guidance):
    """Both use the same logits and noise. The number of known tokens differs between rows."""
    steps, params = 5, params_of(PRIOR)
    text, given = rows(4)
    known = np.random.default_rng(1).random((4, N)) < np.array([[0.0], [0.3], [0.8], [1.0]])
    keys = jax.random.split(jax.random.key(7), 4)
    forward = functools.partial(jax.jit(PRIOR.model.apply), {"params": params})
    null = np.tile(LAYOUT.condition.empty(), (4, 1))

    def logits_of(ids, ratio):
        logits, scale = np.asarray(forward(text, ids)), guidance * ratio
        return (1 + scale) * logits - scale * np.asarray(forward(null, ids)) if guidance else logits

    pairs = [
        [jax.random.split(jax.random.fold_in(key, t)) for key in keys] for t in range(steps)
    ]  # one for the tokens, one for their selection
    token_noise = [np.stack([jax.random.uniform(pair[0], (N,)) for pair in step]) for step in pairs]
    choice_noise = [np.stack([jax.random.gumbel(pair[1], (N,)) for pair in step]) for step in pairs]
    expected = numpy_decode(logits_of, steps, token_noise, choice_noise, np.where(known, given, MASK))
    ours = PRIOR.sample(params, text, keys, known=(given, known), steps=steps, guidance=guidance)
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("order", ["confidence", "random", "halton"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trajectory_unmasks_every_position_once(order, dtype):
    prior = changed(PRIOR, {"dtype": dtype})
    text, given = rows(3)
    known = np.zeros((3, N), bool)
    known[1, :5], known[2] = True, True
    keys = jax.random.split(jax.random.key(0), 3)
    tokens, steps = prior.trajectory(params_of(prior), text, keys, known=(given, known), steps=6, order=order)
    tokens, steps = np.asarray(tokens), np.asarray(steps)
    assert steps.shape == (6, 3, N)
    np.testing.assert_array_equal(steps[-1], tokens)
    before = np.where(known, given, MASK)
    for after in steps:
        settled = before != MASK
        np.testing.assert_array_equal(after[settled], before[settled])
        before = after
    masked = (steps == MASK).sum(-1)
    assert masked[-1].tolist() == [0, 0, 0] and (masked[:, 2] == 0).all()
    counts = -np.diff(np.concatenate([[(np.where(known, 0, 1)).sum(1)], masked]), axis=0)
    assert (counts[:, :2] >= 1).all(), "every step fixes some, in rows with 12 and 7 unknown"


def test_equal_confidences_do_not_under_mask():
    """With equal logits and no noise, all confidences are equal."""
    params = jax.tree.map(np.zeros_like, params_of(PRIOR))
    text, _ = rows(2)
    _, steps = PRIOR.trajectory(
        params, text, jax.random.split(jax.random.key(0), 2), steps=4, temperature=0.0, choice_temperature=0.0
    )
    masked = (np.asarray(steps) == MASK).sum(-1)
    expected = [int(N * np.cos(np.pi * (t + 1) / 8)) for t in range(3)] + [0]
    np.testing.assert_array_equal(masked, np.array([expected, expected]).T)


def test_one_step_and_as_many_steps_as_tokens():
    text, _ = rows(2)
    keys = jax.random.split(jax.random.key(0), 2)
    for steps in (1, N):
        tokens = np.asarray(PRIOR.sample(params_of(PRIOR), text, keys, steps=steps))
        assert 0 <= tokens.min() and tokens.max() < V


# -- from a configuration -----------------------------------------------------------------------------------------


def test_a_large_vocabulary_is_decoded_part_by_part(monkeypatch):
    """The tokens are those of all logits at once."""
    params, (text, _) = params_of(PRIOR), rows(2)
    keys = jax.random.split(jax.random.key(3), 4)

    def decoded():
        decode = lambda params: PRIOR.sample(params, text, keys, guidance=1.0, top_p=0.9)
        jax.clear_caches()  # the constants are not part of the key of a compiled program
        return np.asarray(decode(params)), str(jax.make_jaxpr(decode)(params))

    monkeypatch.setattr(sampling, "SMALL_VOCABULARY", 1)
    at_once, program = decoded()
    monkeypatch.setattr(sampling, "_MOST_LOGITS", 8 * V * N // 3)
    in_parts, split = decoded()
    np.testing.assert_array_equal(in_parts, at_once)
    assert f"f32[8,{N // 3},{V}]" in split and f"f32[8,{N // 3},{V}]" not in program
    jax.clear_caches()


def test_memory_of_decoding_a_large_vocabulary():
    """At 64 rows, 256 tokens and 8,192 classes, the compiler needs less memory than one array of all logits."""
    layout = TokenLayout(Text(10, 4), image_vocab=8192, height=16, width=16)
    prior = MaskGITPrior(layout, MaskGITOptions(trunk_of(width=8, depth=1), head="linear"))
    params = nn.meta.unbox(jax.eval_shape(prior.init, jax.random.key(0)))
    given = jax.ShapeDtypeStruct((1, 4), jnp.int32), jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 64))
    program = jax.jit(prior.sample).lower(params, *given).compile()
    logits = 64 * 256 * 8192 * 4
    assert program.memory_analysis().temp_size_in_bytes < 0.8 * logits
    assert "[64,256,8192]" not in program.as_text()


def test_invalid_configurations():
    trunk = {"width": 16, "depth": 2, "heads": 2}
    assert make("maskgit", {"trunk": trunk}, LAYOUT).options.steps == 8
    for model, token in (
        ({"mask_schedule": "sine"}, "sine"),
        ({"order": "raster"}, "raster"),
        ({"steps": 0}, "steps"),
        ({"loss_average": "rows"}, "loss_average"),
        ({"init_scale": -0.02}, "init_scale"),
        ({"label_smoothing": 2.0}, "label_smoothing"),
        ({"kernel": 3}, "kernel"),
    ):
        with pytest.raises(ConfigError, match=token):
            make("maskgit", {"trunk": trunk, **model}, LAYOUT)
