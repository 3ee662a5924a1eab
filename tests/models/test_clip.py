"""CLIP's towers: preprocessing, the readout of images and captions, causality, and the limit of the scale."""

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
    """Random parameters, large enough for every part to matter."""
    shapes = nn.meta.unbox(jax.eval_shape(clip.init, jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape, scale=0.5).astype(np.float32), shapes)


def draw_images(rows=2, height=16, width=16):
    return np.random.default_rng(1).integers(0, 256, (rows, height, width, 3), np.uint8)


@functools.partial(jax.jit, static_argnums=0)
def encode_image(clip, params, images):
    return clip.encode_image(params, images)


@functools.partial(jax.jit, static_argnums=0)
def encode_text(clip, params, text):
    return clip.encode_text(params, text)


preprocess = jax.jit(models.preprocess, static_argnums=1)


# -- preprocessing ------------------------------------------------------------------------------------------------


def normalised(image):
    return (np.asarray(image, np.float64) / 255 - MEAN) / STD


def test_an_image_of_the_right_size_is_only_normalised():
    images = draw_images()
    np.testing.assert_allclose(preprocess(images, 16), normalised(images), atol=1e-5)
    np.testing.assert_allclose(preprocess(images.astype(np.float32) / 255, 16), preprocess(images, 16), atol=1e-5)


@pytest.mark.parametrize("height, width", [(50, 33), (24, 41), (16, 20), (9, 9), (8, 15)])
def test_other_sizes_are_resized_and_cropped_as_by_pillow(height, width):
    """The short side is resized to 16 (bicubic) and the centre is cropped. Pillow rounds to integers twice."""
    blocks = draw_images(1, 6, 5)[0] // 2 + 60  # values stay inside 0 to 255, at which Pillow clips twice
    smooth = np.asarray(Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC))
    short = min(height, width)
    new = (16 * width // short, 16 * height // short)
    resized = Image.fromarray(smooth).resize(new, Image.Resampling.BICUBIC)
    left, top = (round((side - 16) / 2) for side in new)
    expected = normalised(resized.crop((left, top, left + 16, top + 16)))
    made = preprocess(smooth[None], 16)
    assert made.shape == (1, 16, 16, 3) and made.dtype == jnp.float32
    np.testing.assert_allclose(made[0], expected, atol=1.6 / 255 / min(STD))


# -- vectors ------------------------------------------------------------------------------------------------------


def test_both_towers_give_unit_vectors(clip, params):
    images, text = encode_image(clip, params, draw_images()), encode_text(clip, params, CAPTIONS)
    assert images.shape == (2, 8) and text.shape == (2, 8) and images.dtype == text.dtype == jnp.float32
    for vectors in (images, text):
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)


def test_bfloat16_activations_still_give_float32_vectors(clip, params):
    vectors = encode_image(CLIP(dataclasses.replace(OPTIONS, dtype="bfloat16")), params, draw_images())
    assert vectors.dtype == jnp.float32
    np.testing.assert_allclose(vectors, encode_image(clip, params, draw_images()), atol=0.1)


def test_a_caption_is_read_at_its_first_end_token(clip, params):
    encode = functools.partial(encode_text, clip)
    same = CAPTIONS.copy()
    same[0, 3:] = [7, 19, 2]  # after the first end token
    np.testing.assert_allclose(encode(params, same), encode(params, CAPTIONS), atol=1e-6)
    other = CAPTIONS.copy()
    other[:, 1] = 8
    assert np.abs(encode(params, other) - encode(params, CAPTIONS)).max(axis=1).min() > 1e-3


def test_text_is_causal_by_gradient(clip, params):
    """The state at the end token depends on every position up to it and on no later one."""
    probe = np.random.default_rng(2).normal(size=8).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda p, text: jnp.sum(clip.encode_text(p, text)[0] * probe)))
    for end in (0, 2, 5):
        text = np.arange(6, dtype=np.int32)[None] + 3
        text[0, end] = OPTIONS.end_id
        by_position = np.abs(gradient(params, text)["text"]["positions"]).max(axis=1)
        assert (by_position[: end + 1] > 1e-6).all() and (by_position[end + 1 :] == 0).all()


def test_every_patch_reaches_the_class_token(clip, params):
    read = lambda p: jnp.sum(
        jnp.square(clip.module.apply({"params": p}, jnp.float32(draw_images()) / 255, method="encode_image")[:, 0])
    )
    by_position = np.abs(jax.jit(jax.grad(read))(params)["image"]["positions"]).max(axis=1)
    assert by_position.shape == (5,) and (by_position > 0).all()


@pytest.fixture(scope="module")
def by_patches():
    """A CLIP without image blocks, whose image vector is a projection of all patches."""
    return CLIP(dataclasses.replace(OPTIONS, image_readout="patches", image_depth=0))


def test_the_readout_of_patches_is_a_projection_of_all_patches(by_patches):
    params = nn.meta.unbox(jax.jit(by_patches.init)(jax.random.key(0)))
    tower = params["image"]
    assert "class_token" not in tower and tower["positions"].shape == (4, 16)
    assert tower["projection"]["kernel"].shape == (64, 8)
    images = draw_images()
    patches = normalised(images).reshape(2, 2, 8, 2, 8, 3).swapaxes(2, 3).reshape(2, 4, -1)
    x = patches @ np.float64(tower["patch"]["kernel"]) + np.float64(tower["positions"])
    for name in ("norm_before", "norm_after"):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        x = x * np.float64(tower[name]["norm"]["scale"]) + np.float64(tower[name]["norm"]["bias"])
    y = x.reshape(2, -1) @ np.float64(tower["projection"]["kernel"])
    expected = y / np.linalg.norm(y, axis=1, keepdims=True)
    np.testing.assert_allclose(encode_image(by_patches, params, images), expected, atol=1e-4)


def test_the_scale_of_initial_positions():
    """Only the positions change with `image_positions`.

    At OpenAI's scale, a small tower hardly distinguishes flat patches that changed places.
    """
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


# -- the scale ----------------------------------------------------------------------------------------------------


def test_the_scale_is_limited_at_its_use(clip):
    at = lambda value: float(clip.scale({"logit_scale": jnp.float32(value)}))
    np.testing.assert_allclose([at(0.0), at(math.log(50)), at(math.log(100)), at(9.0)], [1, 50, 100, 100], rtol=1e-5)


def test_beyond_the_limit_only_reducing_gradients_pass():
    gradient = lambda x, sign: float(jax.grad(lambda y: sign * limited(y))(jnp.float32(x)))
    inside, outside = MAX_LOG_SCALE - 0.1, MAX_LOG_SCALE + 0.1
    assert [gradient(inside, s) for s in (1, -1)] == [1, -1]
    assert [gradient(outside, s) for s in (1, -1)] == [1, 0]


# -- sizes --------------------------------------------------------------------------------------------------------


def test_vit_b32_has_the_published_number_of_parameters():
    shapes = nn.meta.unbox(jax.eval_shape(CLIP(CLIPOptions()).init, jax.random.key(0)))
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == 151_277_313


def test_sizes_that_do_not_fit():
    for changes, token in [
        ({"patch": 0}, "patch"),
        ({"image_width": 0}, "image_width"),
        ({"text_heads": -1}, "text_heads"),
        ({"patch": 5}, "patch"),
        ({"text_heads": 3}, "text_heads"),
        ({"activation": "relu"}, "relu"),
        ({"image_readout": "mean"}, "mean"),
        ({"image_positions": 0.0}, "image_positions"),
        ({"end_id": 20}, "20"),
    ]:
        with pytest.raises(ConfigError, match=token):
            dataclasses.replace(OPTIONS, **changes)
    config = {"model": {"depth": 3}, "data": {"image_size": 32}, "text": {"length": 7}}
    with pytest.raises(ConfigError, match="depth"):
        options_of_training(config, 11)
    made = options_of_training({**config, "model": {"patch": 8}}, 11)
    assert (made.text_length, made.text_vocab, made.end_id) == (8, 12, 11)
