"""A convolution as a product of patches equals XLA's convolution, in values and in both gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.image_tokenizers import patch_products
from dalle_jax.image_tokenizers.patch_products import convolve

ORDER = ("NHWC", "HWIO", "NHWC")


@pytest.mark.parametrize(
    ("size", "kernel", "strides", "padding"),
    [
        ((8, 8), (4, 4), (2, 2), ((1, 1), (1, 1))),
        ((8, 8), (4, 4), (1, 1), ((1, 1), (1, 1))),
        ((7, 9), (3, 2), (2, 3), ((0, 1), (2, 0))),
    ],
)
def test_equals_a_convolution(size, kernel, strides, padding):
    images = jax.random.normal(jax.random.key(0), (3, *size, 5))
    weights = jax.random.normal(jax.random.key(1), (*kernel, 5, 6))
    usual = functools.partial(jax.lax.conv_general_dilated, dimension_numbers=ORDER)
    loss = lambda convolution, x, k: jnp.sum(jnp.sin(convolution(x, k, strides, padding)))
    found, expected = (
        jax.jit(jax.value_and_grad(functools.partial(loss, convolution), (0, 1)))(images, weights)
        for convolution in (convolve, usual)
    )
    assert jax.eval_shape(lambda: convolve(images, weights, strides, padding)).shape == usual(
        images, weights, strides, padding
    ).shape  # fmt: skip
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), found, expected)


def test_other_devices_keep_their_convolution(monkeypatch):
    monkeypatch.setattr(patch_products, "platform", lambda: "gpu")
    program = jax.make_jaxpr(lambda x, k: convolve(x, k, (1, 1), ((1, 1), (1, 1)), dimension_numbers=ORDER))
    assert "conv_general_dilated" in str(program(jnp.ones((1, 8, 8, 2)), jnp.ones((4, 4, 2, 3))))
