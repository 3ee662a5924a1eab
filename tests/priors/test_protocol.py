"""Properties of every `TokenPrior`: one suite that runs over all priors."""

import functools

import golden_updates
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from prior_cases import LAYOUT, PRIORS, N, T, V, changed, loss_of, params_of, rows

from dalle_jax.distributed.mesh import make_mesh
from dalle_jax.distributed.rows import over_rows
from dalle_jax.distributed.sharding import batch_sharding, on_mesh, shardings_of
from dalle_jax.errors import ConfigError

SLOW = (
    "any order", "start tokens", "any order, neighbours", "diagonal", "any order, start tokens", "shifted",
    "maskgit, small data", "maskgit, published",
)  # fmt: skip
every_prior = pytest.mark.parametrize(
    "prior", [pytest.param(p, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name, p in PRIORS.items()]
)


@every_prior
def test_a_sample_depends_on_its_own_key_only(prior):
    """Tokens are equal at batch 1, at batch 8 and on eight devices, with replicated or sharded parameters."""
    text, _ = rows(8)
    keys = jax.random.split(jax.random.key(0), 8)
    params = params_of(prior)
    together = np.asarray(prior.sample(params, text, keys))
    for i in (0, 7):
        np.testing.assert_array_equal(prior.sample(params, text[i : i + 1], keys[i : i + 1])[0], together[i])
    for sizes in ({"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}):
        mesh = make_mesh(**sizes)
        layouts = shardings_of(jax.eval_shape(prior.init, jax.random.key(0)), mesh)
        draw = functools.partial(prior.sample, jax.device_put(params, layouts))
        np.testing.assert_array_equal(over_rows(mesh, draw, text, keys), together)
        one_caption = draw(text[:1], keys[:6])  # eight devices divide neither one caption nor six rows
        np.testing.assert_array_equal(over_rows(mesh, draw, text[:1], keys[:6]), one_caption)
    assert len(np.unique(together, axis=0)) == 8


@every_prior
def test_candidates_share_their_captions_text(prior):
    text, _ = rows(2)
    keys = jax.random.split(jax.random.key(0), 8)
    shared = prior.sample(params_of(prior), text, keys)
    np.testing.assert_array_equal(shared, prior.sample(params_of(prior), text.repeat(4, axis=0), keys))
    with pytest.raises(ValueError, match="8 keys"):
        prior.sample(params_of(prior), rows(3)[0], keys)


@every_prior
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@settings(max_examples=10, deadline=None, database=None)
@given(data=st.data())
def test_known_tokens_are_immutable(prior, dtype, data):
    """Known tokens are returned unchanged for any mask and any sampling parameters, also if all or none is known."""
    schedules = ["cosine", "pow3"] if prior.name == "maskgit" else [None]
    schedule = data.draw(st.sampled_from(schedules))
    prior = changed(prior, {"dtype": dtype}, **({"mask_schedule": schedule} if schedule else {}))
    text, tokens = rows(4)
    mask = np.random.default_rng(data.draw(st.integers(0, 99))).random((4, N)) < data.draw(st.floats(0, 1))
    mask[0], mask[1] = True, False
    knobs = {"temperature": data.draw(st.floats(0, 2)), "final_temperature": data.draw(st.floats(0, 2))}
    knobs |= {"guidance": data.draw(st.floats(0.1, 9)), "top_k": data.draw(st.integers(1, 2 * V)), "top_p": 0.9}
    keys = jax.random.split(jax.random.key(data.draw(st.integers(0, 99))), 4)
    out = np.asarray(prior.sample(params_of(prior), text, keys, known=(tokens, mask), **knobs))
    assert out.shape == (4, N) and out.dtype == np.int32
    np.testing.assert_array_equal(out[mask], tokens[mask])
    assert 0 <= out.min() and out.max() < V, "the mask id must not leak"


@every_prior
def test_guidance_and_its_negative(prior):
    """s = 0 is no guidance. Guidance leads away from the negative caption, by default from the empty caption."""
    text, _ = rows(3)
    keys, params = jax.random.split(jax.random.key(0), 3), params_of(prior)
    draw = lambda **knobs: np.asarray(prior.sample(params, text, keys, temperature=0.0, **knobs))
    null = LAYOUT.condition.empty()[None]
    np.testing.assert_array_equal(draw(guidance=2.0), draw(guidance=2.0, negative=null))
    assert (draw(guidance=2.0) != draw(guidance=2.0, negative=rows(1, seed=4)[0])).any()
    assert (draw(guidance=2.0) != draw()).any()
    np.testing.assert_array_equal(
        draw(guidance=2.0, negative=text), draw()
    )  # guidance away from the caption itself cancels: (1 + s)l - s·l
    with pytest.raises(ValueError, match="guidance"):
        draw(negative=null)


@every_prior
def test_dropped_captions(prior):
    text, tokens = rows(4)
    other, _ = rows(4, seed=9)
    params, key = params_of(prior), jax.random.key(0)
    always = changed(prior, caption_drop=1.0)
    losses = [loss_of(always, params, t, tokens, key, True) for t in (text, other)]
    np.testing.assert_equal(jax.device_get(losses[0]), jax.device_get(losses[1]))
    measured = [loss_of(always, params, t, tokens, key, False)[0] for t in (text, other)]
    assert measured[0] != measured[1], "captions are dropped in training only"


@every_prior
def test_rows_that_do_not_count(prior):
    """Padding rows change only the random numbers, so with equal rows and no randomness they change nothing."""
    text, tokens = rows(4)
    valid = np.array([True, False, True, False])
    measure = lambda tokens: loss_of(prior, params_of(prior), text, tokens, jax.random.key(0), False, valid)
    garbled = np.where(valid[:, None], tokens, (tokens + 1) % V)
    np.testing.assert_equal(jax.device_get(measure(tokens)), jax.device_get(measure(garbled)))
    garbled = np.where(valid[:, None], (tokens + 1) % V, tokens)
    assert measure(tokens)[0] != measure(garbled)[0]


@every_prior
def test_a_fresh_models_loss_is_that_of_guessing(prior):
    text, tokens = rows(16)
    params = nn.meta.unbox(jax.jit(prior.init)(jax.random.key(0)))
    _, scalars = loss_of(prior, params, text, tokens, jax.random.key(1), False)
    np.testing.assert_allclose(scalars["image_nats"], np.log(V), rtol=0.02)


@every_prior
@pytest.mark.parametrize("inner", [7, 24])
def test_starting_from_the_tokenizers_codebook(prior, inner):
    """Image embedding and untied head hold the codebook, turned and scaled; the rest is as without."""
    fresh = changed(prior, codebook_init=True, tied_embeddings=False)
    codebook = np.random.default_rng(0).normal(3.0, 5.0, (V, inner)).astype(np.float32)
    codebook[:, 3:] = 3.0  # of rank 3: survives a rotation into 16 dimensions
    init = lambda codebook: nn.meta.unbox(jax.jit(fresh.init)(jax.random.key(0), codebook))
    random, ours = init(None), init(codebook)
    flat = lambda tree: {jax.tree_util.keystr(path, simple=True): x for path, x in jax.tree.leaves_with_path(tree)}
    random, ours = flat(random), flat(ours)
    tables = ("embeddingimage", "embeddingimage_head_kernel")
    for name in ours:
        if name not in tables:
            np.testing.assert_array_equal(ours[name], random[name])
    distances = lambda x: np.linalg.norm(np.asarray(x)[:, None] - np.asarray(x)[None], axis=-1)
    for name in tables:
        scale = np.linalg.norm(ours[name]) / np.linalg.norm(codebook - codebook.mean(0))
        np.testing.assert_allclose(np.asarray(ours[name]).std(), np.asarray(random[name]).std(), rtol=1e-3)
        if inner <= 16:  # an isometry
            expected = distances(codebook) * scale
            np.testing.assert_allclose(distances(ours[name]), expected, rtol=1e-3, atol=1e-4)
        else:  # cut off: near stays near
            assert np.corrcoef(distances(ours[name]).ravel(), distances(codebook).ravel())[0, 1] > 0.8


@every_prior
def test_sharded_loss_equals_the_loss_on_one_device(prior):
    text, tokens = rows(8)
    params, key = params_of(prior), jax.random.key(0)

    def loss(params, text, tokens):
        return prior.loss(params, text, tokens, key, train=True)[0]

    expected = jax.jit(jax.value_and_grad(loss))(params, text, tokens)
    boxed = jax.eval_shape(prior.init, key)
    mesh = make_mesh(2, 2, 2)
    with on_mesh(mesh):
        placed = jax.device_put(params, shardings_of(boxed, mesh))
        batch = jax.device_put((text, tokens), batch_sharding(mesh))
        ours = jax.jit(jax.value_and_grad(loss))(placed, *batch)
    np.testing.assert_allclose(ours[0], expected[0], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(ours[1]), jax.tree.leaves(expected[1])):
        np.testing.assert_allclose(a, b, atol=2e-5)
    assert placed["trunk"]["layer_0"]["mlp"]["up"]["kernel"].addressable_shards[0].data.size < 16 * 64


@every_prior
def test_bfloat16_inside_float32_outside(prior):
    prior = changed(prior, {"dtype": "bfloat16", "depth": 9, "scan": True})
    boxed = jax.eval_shape(prior.init, jax.random.key(0))
    assert {str(x.dtype) for x in jax.tree.leaves(boxed)} == {"float32"}
    text, tokens = rows(2)
    outputs = jax.eval_shape(lambda p: prior.model.apply({"params": p}, text, tokens), nn.meta.unbox(boxed))
    assert {x.dtype for x in jax.tree.leaves(outputs)} == {jnp.dtype("float32")}
    loss, scalars = jax.eval_shape(
        lambda p: prior.loss(p, text, tokens, jax.random.key(0), train=True), nn.meta.unbox(boxed)
    )
    assert {x.dtype for x in (loss, *scalars.values())} == {jnp.dtype("float32")}


@every_prior
def test_overfitting_one_batch(prior):
    """Loss under 0.05 nats in the end, and greedy samples are the batch (but for a token or two, drawn at once)."""
    prior = changed(prior, {"width": 32}, caption_drop=0.0)
    if prior.name == "maskgit":
        prior = changed(prior, label_smoothing=0.0)
    text, tokens = rows(4)
    steps, peak = (120, 1e-2) if prior.name == "autoregressive" and not prior.any_order else (300, 4e-3)
    optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0.0, peak, 10, steps, 1e-4))

    @jax.jit
    def train(key):
        def update(carry, step):
            params, opt_state = carry
            loss = lambda p: prior.loss(p, text, tokens, jax.random.fold_in(key, step), train=True)  # noqa: E731
            (_, scalars), grads = jax.value_and_grad(loss, has_aux=True)(params)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), scalars["image_nats"]

        params = nn.meta.unbox(prior.init(key))
        (params, _), nats = jax.lax.scan(update, (params, optimizer.init(params)), jnp.arange(steps))
        return params, nats

    params, image_nats = train(jax.random.key(0))
    last = np.mean(image_nats[-20:])  # a masked prior's loss is that of one mask
    assert image_nats[0] > 2.5 and last < 0.05, last
    drawn = prior.sample(params, text, jax.random.split(jax.random.key(5), 4), temperature=0.0)
    assert np.mean(drawn == tokens) > 0.95


@pytest.mark.parametrize("name", ["prior", "maskgit"])
def test_golden_update(name):
    golden_updates.check(name)


@every_prior
def test_invalid_options(prior):
    text, keys = rows(2)[0], jax.random.split(jax.random.key(0), 2)
    draw = lambda **knobs: prior.sample(params_of(prior), text, keys, **knobs)
    for knobs in ({"temperature": -1.0}, {"top_k": 0}, {"top_p": 1.5}, {"guidance": -1.0}, {"steps": 0}):
        with pytest.raises(ConfigError, match=next(iter(knobs))):
            draw(**knobs)
    with pytest.raises(ValueError, match="zigzag"):
        draw(order="zigzag")
    assert T == 4
