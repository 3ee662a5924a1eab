"""Features of each layer are the trunk's own hidden states, averaged over the image positions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import untrained_run
from prior_cases import PRIORS, changed, params_of, rows

from dalle_jax.errors import ConfigError
from dalle_jax.evaluation import layer_features
from dalle_jax.models import clip as clips
from dalle_jax.models import transformer
from dalle_jax.models.trunk import Trunk, for_decoding

STATES = jax.jit(layer_features.prior_states, static_argnums=0)


def stream(prior, params, tokens):
    """The embedded stream of the empty caption and an image, in raster order."""
    text = jnp.tile(prior.layout.condition.empty()[None], (len(tokens), 1))
    model, bound = prior.model, {"params": params}
    if prior.name == "maskgit":
        both = lambda m: jnp.concatenate([m.embedding.text(text), m.embedding.image(tokens)], axis=1)
        return model.apply(bound, method=both)
    cells = jnp.tile(jnp.arange(tokens.shape[1])[None], (len(tokens), 1)) if prior.any_order else None
    return model.apply(bound, text, tokens, False, cells, method="embed")


@pytest.mark.parametrize("name", ["autoregressive", "any order", "start tokens", "shifted", "maskgit"])
def test_states_are_those_of_the_blocks_one_by_one(name):
    prior = PRIORS[name]
    params, (_, tokens) = params_of(prior), rows(2)
    states = STATES(prior, params, tokens)
    x, t = stream(prior, params, tokens), prior.stream.prefix_length
    options = prior.options.trunk
    for i, pattern in enumerate(prior.options.patterns):
        block = transformer.Block(options, prior.stream, (pattern,))
        x = jax.jit(block.apply, static_argnums=2)({"params": params["trunk"][f"layer_{i}"]}, x, False)
        np.testing.assert_allclose(states[i + 1], x[:, t:], rtol=1e-5, atol=1e-5)
    assert len(states) == options.depth + 1 and states[0].shape == (2, prior.layout.image_length, options.width)


def test_the_last_state_and_the_final_norm_give_the_trunks_output():
    prior = PRIORS["maskgit"]
    params, (_, tokens) = params_of(prior), rows(2)
    trunk = Trunk(prior.options.trunk, prior.layout, prior.options.patterns)
    expected = jax.jit(trunk.apply, static_argnums=2)({"params": params["trunk"]}, stream(prior, params, tokens), False)
    norm = transformer.Norm(prior.options.trunk.norm, "float32")
    found = norm.apply({"params": params["trunk"]["final_norm"]}, STATES(prior, params, tokens)[-1])
    np.testing.assert_allclose(found, expected[:, prior.layout.prefix_length :], rtol=1e-5, atol=1e-5)


def test_scanned_layers_have_the_same_states():
    prior = changed(PRIORS["maskgit"], {"scan": True})
    params, (_, tokens) = params_of(prior), rows(2)
    flat, options = for_decoding(params, prior.options)
    plain = dataclasses.replace(prior, options=options)
    assert "units" in params["trunk"] and len(STATES(plain, flat, tokens)) == 3


def test_states_of_clip_are_those_of_its_patches():
    scorer = untrained_run.clip()
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    first, second = jax.jit(layer_features.clip_states, static_argnums=0)(scorer.clip, scorer.params, images)
    o, tower = scorer.clip.options, scorer.params["image"]
    block = clips.Block(o.image_width, 2, 4 * o.image_width, 1, o.activation, False, o.dtype, o.attention_kernel)
    # With the class token in front, as the block sees them.
    pixels = clips.preprocess(images, 16)
    captured = scorer.clip.module.apply(
        {"params": scorer.params}, pixels, method="encode_image", mutable=["intermediates"],
        capture_intermediates=lambda module, _: module.name == "norm_before",
    )[1]  # fmt: skip
    before = captured["intermediates"]["image"]["norm_before"]["__call__"][0]
    after = block.apply({"params": tower["block_0"]}, before)
    assert first.shape == second.shape == (2, 4, 16)
    np.testing.assert_allclose(first, before[:, 1:], rtol=1e-5)
    np.testing.assert_allclose(second, after[:, 1:], rtol=1e-4, atol=1e-5)


def test_workdirs_are_opened_by_their_task(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    run = untrained_run.prior(tmp_path / "prior", "maskgit.py:shapes")
    model, fresh = layer_features.open_model(run), layer_features.open_model(run, untrained=True)
    features = np.asarray(model.extract(images))
    assert model.title == "maskgit prior" and features.shape == (3, 3, 16)
    assert not np.allclose(features, fresh.extract(images), atol=1e-3)
    untrained_run.clip().save(tmp_path / "clip")
    assert layer_features.open_model(str(tmp_path / "clip")).extract(images).shape == (3, 2, 16)
    with pytest.raises(ConfigError, match="dvae"):
        layer_features.open_model(untrained_run.image_tokenizer(tmp_path / "dvae"))
