"""CLIP's towers: pictures as they enter, where a caption is read, what it may see, and the factor's limit."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dalle_jax.errors import ConfigError
from dalle_jax.models import clip as models
from dalle_jax.models.clip import CLIP, MAX_LOG_SCALE, MEAN, STD, CLIPOptions, limited, options_of_training

OPTIONS = CLIPOptions(
    image_size=16, patch=8, image_width=16, image_depth=1, image_heads=2,
    text_width=16, text_depth=2, text_heads=2, embed_dim=8, text_length=6, text_vocab=20, end_id=19,
)  # fmt: skip
CAPTIONS = np.array([[3, 4, 19, 19, 19, 19], [5, 4, 3, 2, 1, 19]], np.int32)


@pytest.fixture(scope="module")
def clip():
    return CLIP(OPTIONS)


@pytest.fixture(scope="module")
def params(clip):
    """Of a size at which every part matters."""
    shapes = nn.meta.unbox(jax.eval_shape(clip.init, jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape, scale=0.5).astype(np.float32), shapes)


def pictures(rows=2, height=16, width=16):
    return np.random.default_rng(1).integers(0, 256, (rows, height, width, 3), np.uint8)


@functools.partial(jax.jit, static_argnums=0)
def encode_image(clip, params, images):
    return clip.encode_image(params, images)


@functools.partial(jax.jit, static_argnums=0)
def encode_text(clip, params, text):
    return clip.encode_text(params, text)


preprocess = jax.jit(models.preprocess, static_argnums=1)


# -- pictures -----------------------------------------------------------------------------------------------------


def normalized(image):
    return (np.asarray(image, np.float64) / 255 - MEAN) / STD


def test_a_picture_of_the_right_size_is_only_normalized():
    images = pictures()
    np.testing.assert_allclose(preprocess(images, 16), normalized(images), atol=1e-5)
    np.testing.assert_allclose(preprocess(images.astype(np.float32) / 255, 16), preprocess(images, 16), atol=1e-5)


@pytest.mark.parametrize("height, width", [(50, 33), (24, 41), (16, 20), (9, 9), (8, 15)])
def test_other_sizes_are_resized_and_cut_as_pillow_does_it(height, width):
    """Bicubic, the short side to 16, the middle cut out; Pillow rounds to whole pixel values, twice."""
    blocks = pictures(1, 6, 5)[0] // 2 + 60  # what goes beyond 0 and 255 on the way is cut off twice by Pillow
    smooth = np.asarray(Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC))
    short = min(height, width)
    new = (16 * width // short, 16 * height // short)
    resized = Image.fromarray(smooth).resize(new, Image.Resampling.BICUBIC)
    left, top = (round((side - 16) / 2) for side in new)
    expected = normalized(resized.crop((left, top, left + 16, top + 16)))
    made = preprocess(smooth[None], 16)
    assert made.shape == (1, 16, 16, 3) and made.dtype == jnp.float32
    np.testing.assert_allclose(made[0], expected, atol=1.6 / 255 / min(STD))


# -- vectors ------------------------------------------------------------------------------------------------------


def test_both_towers_give_unit_vectors(clip, params):
    images, text = encode_image(clip, params, pictures()), encode_text(clip, params, CAPTIONS)
    assert images.shape == (2, 8) and text.shape == (2, 8) and images.dtype == text.dtype == jnp.float32
    for vectors in (images, text):
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)


def test_bfloat16_activations_still_give_float32_vectors(clip, params):
    vectors = encode_image(CLIP(dataclasses.replace(OPTIONS, dtype="bfloat16")), params, pictures())
    assert vectors.dtype == jnp.float32
    np.testing.assert_allclose(vectors, encode_image(clip, params, pictures()), atol=0.1)


def test_a_caption_is_read_at_its_first_end_token(clip, params):
    encode = functools.partial(encode_text, clip)
    same = CAPTIONS.copy()
    same[0, 3:] = [7, 19, 2]  # behind the first end token
    np.testing.assert_allclose(encode(params, same), encode(params, CAPTIONS), atol=1e-6)
    other = CAPTIONS.copy()
    other[:, 1] = 8
    assert np.abs(encode(params, other) - encode(params, CAPTIONS)).max(axis=1).min() > 1e-3


def test_text_is_causal_by_gradient(clip, params):
    """What is read at the end token depends on every position up to it and on none behind it."""
    probe = np.random.default_rng(2).normal(size=8).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda p, text: jnp.sum(clip.encode_text(p, text)[0] * probe)))
    for end in (0, 2, 5):
        text = np.arange(6, dtype=np.int32)[None] + 3
        text[0, end] = OPTIONS.end_id
        by_position = np.abs(gradient(params, text)["text"]["positions"]).max(axis=1)
        assert (by_position[: end + 1] > 1e-6).all() and (by_position[end + 1 :] == 0).all()


def test_every_patch_reaches_the_class_token(clip, params):
    read = lambda p: jnp.sum(
        jnp.square(clip.module.apply({"params": p}, jnp.float32(pictures()) / 255, method="encode_image")[:, 0])
    )
    by_position = np.abs(jax.jit(jax.grad(read))(params)["image"]["positions"]).max(axis=1)
    assert by_position.shape == (5,) and (by_position > 0).all()


@pytest.fixture(scope="module")
def by_patches():
    """All patches read, through no block: what reaches the vector from a patch is its own place in the projection."""
    return CLIP(dataclasses.replace(OPTIONS, image_readout="patches", image_depth=0))


def test_the_readout_of_patches_is_a_projection_of_all_side_by_side(by_patches):
    params = nn.meta.unbox(jax.jit(by_patches.init)(jax.random.key(0)))
    tower = params["image"]
    assert "class_token" not in tower and tower["positions"].shape == (4, 16)
    assert tower["projection"]["kernel"].shape == (64, 8)
    images = pictures()
    patches = normalized(images).reshape(2, 2, 8, 2, 8, 3).swapaxes(2, 3).reshape(2, 4, -1)
    x = patches @ np.float64(tower["patch"]["kernel"]) + np.float64(tower["positions"])
    for name in ("norm_before", "norm_after"):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        x = x * np.float64(tower[name]["norm"]["scale"]) + np.float64(tower[name]["norm"]["bias"])
    y = x.reshape(2, -1) @ np.float64(tower["projection"]["kernel"])
    expected = y / np.linalg.norm(y, axis=1, keepdims=True)
    np.testing.assert_allclose(encode_image(by_patches, params, images), expected, atol=1e-4)


def test_how_large_positions_start():
    """And nothing else starts otherwise. At OpenAI's size a tower of few heads hardly tells flat patches that changed
    places."""
    options = dataclasses.replace(OPTIONS, image_size=32, image_width=64)
    flat = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    apart, made = {}, {}
    for size in (1.0, 8.0):
        clip = CLIP(dataclasses.replace(options, image_positions=size))
        made[size] = nn.meta.unbox(jax.jit(clip.init)(jax.random.key(0)))
        vectors, turned = (encode_image(clip, made[size], x) for x in (flat, flat[:, ::-1]))
        apart[size] = 1 - np.mean(np.sum(vectors * turned, axis=1))
    for (path, a), b in zip(jax.tree.leaves_with_path(made[8.0]), jax.tree.leaves(made[1.0])):
        large = jax.tree_util.keystr(path) == "['image']['positions']"
        np.testing.assert_allclose(a, b * (8 if large else 1), rtol=1e-6)
    np.testing.assert_allclose(made[8.0]["image"]["positions"].std(), 1.0, rtol=0.1)
    assert apart[8.0] > 5 * apart[1.0]


# -- the factor ---------------------------------------------------------------------------------------------------


def test_the_factor_is_limited_where_it_is_used(clip):
    at = lambda value: float(clip.scale({"logit_scale": jnp.float32(value)}))
    np.testing.assert_allclose([at(0.0), at(math.log(50)), at(math.log(100)), at(9.0)], [1, 50, 100, 100], rtol=1e-5)


def test_beyond_the_limit_only_the_way_back_is_open():
    gradient = lambda x, sign: float(jax.grad(lambda y: sign * limited(y))(jnp.float32(x)))
    inside, outside = MAX_LOG_SCALE - 0.1, MAX_LOG_SCALE + 0.1
    assert [gradient(inside, s) for s in (1, -1)] == [1, -1]
    assert [gradient(outside, s) for s in (1, -1)] == [1, 0]


# -- sizes --------------------------------------------------------------------------------------------------------


def test_vit_b32_has_the_published_number_of_parameters():
    shapes = nn.meta.unbox(jax.eval_shape(CLIP(CLIPOptions()).init, jax.random.key(0)))
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == 151_277_313


def test_sizes_that_do_not_fit():
    for changes, words in [
        ({"patch": 0}, "model.patch is 0; expected at least 1"),
        ({"image_width": 0}, "model.image_width is 0; expected at least 1"),
        ({"text_heads": -1}, "model.text_heads is -1; expected at least 1"),
        ({"patch": 5}, "patch is 5"),
        ({"text_heads": 3}, "text_width is 16; expected a multiple of text_heads=3"),
        ({"activation": "relu"}, "'relu'; expected one of quick_gelu, gelu"),
        ({"image_readout": "mean"}, "'mean'; expected one of class_token, patches"),
        ({"image_positions": 0.0}, "image_positions is 0.0; expected a number above 0"),
        ({"end_id": 20}, "end token 20 lies outside the vocabulary of 20"),
    ]:
        with pytest.raises(ConfigError, match=words):
            dataclasses.replace(OPTIONS, **changes)
    config = {"model": {"depth": 3}, "data": {"image_size": 32}, "text": {"length": 7}}
    with pytest.raises(ConfigError, match="config.model has no key 'depth'"):
        options_of_training(config, 11)
    made = options_of_training({**config, "model": {"patch": 8}}, 11)
    assert (made.text_length, made.text_vocab, made.end_id) == (8, 12, 11)
