"""The perceptual distance of a CLIP against a computation from its blocks, one after the other."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.clip.distance import distance
from dalle_jax.models.clip import MEAN, STD, Block, CLIPOptions, ImageTower
from dalle_jax.models.norm import Norm

SMALL = dict(image_size=16, patch=8, image_width=16, image_depth=2, image_heads=2, embed_dim=8, activation="gelu")


@functools.cache
def tower(readout):
    options = CLIPOptions(**SMALL, image_readout=readout)
    params = jax.jit(ImageTower(options).init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    return options, jax.tree.map(np.asarray, nn.meta.unbox(params))


def images(seed, side=16):
    return jax.random.uniform(jax.random.key(seed), (2, side, side, 3), minval=-1)


def states(options, params, pixels):
    """The patches after each block, by numpy but for the blocks themselves."""
    x = (np.asarray(pixels) / 2 + 0.5 - MEAN) / STD
    patches = x.reshape(2, 2, 8, 2, 8, 3).swapaxes(2, 3).reshape(2, 4, -1)
    x = patches @ params["patch"]["kernel"]
    if options.image_readout == "class_token":
        x = np.concatenate([np.broadcast_to(params["class_token"], (2, 1, 16)), x], axis=1)
    x = x + params["positions"]
    x = Norm("layernorm", "float32").apply({"params": params["norm_before"]}, jnp.asarray(x, jnp.float32))
    for i in range(options.image_depth):
        block = Block(16, 2, 64, options.image_depth, "gelu", False, "float32", "xla")
        x = block.apply({"params": params[f"block_{i}"]}, jnp.asarray(x, jnp.float32))
        yield np.asarray(x)[:, -4:]


@pytest.mark.parametrize("readout", ["class_token", "patches"])
def test_is_the_mean_over_patches_and_blocks(readout):
    options, params = tower(readout)
    first, second = images(1), images(2)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    pairs = zip(states(options, params, first), states(options, params, second))
    expected = np.mean([((unit(a) - unit(b)) ** 2).sum(-1).mean(-1) for a, b in pairs], axis=0)
    assert (expected > 0.01).all()
    np.testing.assert_allclose(jax.jit(distance, static_argnums=0)(options, params, first, second), expected, rtol=1e-4)


def test_equal_images_have_no_distance_and_no_gradient():
    options, params = tower("class_token")
    value, gradient = jax.value_and_grad(lambda x: distance(options, params, images(1), x).sum())(images(1))
    assert float(value) == 0 and float(jnp.abs(gradient).max()) == 0


def test_images_of_another_size_are_resized():
    options, params = tower("class_token")
    found = distance(options, params, images(1, 24), images(2, 24))
    assert found.shape == (2,) and (np.asarray(found) > 0).all()
