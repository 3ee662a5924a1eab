"""Inception-v3 for FID and the Inception score: pool features and class logits of images. Inference only.

This is the network of Szegedy et al. (arXiv 1512.00567) as published for TensorFlow in December 2015. It differs from
the usual one in three points:

* It has 1008 classes.
* Average pooling inside the blocks excludes the padding from the average.
* The last block pools by maximum.

Batch normalisation is folded into the convolutions before it (`pretrained/inception.py`). Modules have the names of the
PyTorch ports. All computations are float32 at full precision on every device, because FID is sensitive to rounding.

The resize filter is part of the protocol of a result (`RESIZES`). Neither filter antialiases.

    B batch    H, W image    C channels
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from dalle_jax.errors import ConfigError
from dalle_jax.pytree import PyTree

SIZE = 299  # side of the network's input in pixels
WIDTH = 2048  # number of pool features
CLASSES = 1008
RESIZES = {
    "bilinear_tf1": "pixel i of the result lies at i·H/299; then (x − 128) / 128. The original FID, and torch-fidelity",
    "bilinear_half_pixel": "pixel i lies at (i + ½)·H/299 − ½; then x / 127.5 − 1. pytorch-fid",
}


class Features(NamedTuple):
    """Outputs of the network.

    Attributes:
      pool: features of FID, the average over the last feature map, float32 [B, 2048].
      logits: class logits, float32 [B, 1008].
      unbiased_logits: logits without the bias of the last layer, for the Inception score, float32 [B, 1008].
    """

    pool: Float[Array, "B 2048"]
    logits: Float[Array, "B 1008"]
    unbiased_logits: Float[Array, "B 1008"]


def extract(params: PyTree, images: ArrayLike, resize: str = "bilinear_tf1") -> Features:
    """Computes features of images of any size.

    Args:
      params: parameters of `Inception`, such as those of `pretrained.inception.load`.
      images: uint8 [B, H, W, 3].
      resize: a key of `RESIZES`.

    Raises:
      ConfigError: an unknown `resize`.
      ValueError: images of another shape or dtype.
    """
    return _network(params, preprocess(images, resize))


@jax.jit
def _network(params: PyTree, x: Float[ArrayLike, "B 299 299 3"]) -> Features:
    """Runs the network. It is compiled apart from `preprocess`, so that it compiles once for all image sizes."""
    return Inception().apply({"params": params}, x)


# -- input of the network -----------------------------------------------------------------------------------------


@jax.jit(static_argnames="resize")
def preprocess(images: ArrayLike, resize: str = "bilinear_tf1") -> Float[Array, "B 299 299 3"]:
    """Resizes and scales images, uint8 [B, H, W, 3], to about [-1, 1]. Arguments and errors are those of `extract`."""
    if images.dtype != jnp.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"Images are {images.dtype} {images.shape}; expected uint8 [B, H, W, 3].")
    rows, columns = (resize_matrix(size, SIZE, resize) for size in images.shape[1:3])
    product = lambda form, *arrays: jnp.einsum(form, *arrays, precision=jax.lax.Precision.HIGHEST)
    x = product("qw,bhwc->bhqc", columns, images.astype(jnp.float32))
    x = product("ph,bhqc->bpqc", rows, x)
    return (x - 128) / 128 if resize == "bilinear_tf1" else x / 127.5 - 1


def resize_matrix(size: int, target: int, resize: str) -> Float[np.ndarray, "{target} {size}"]:
    """Returns the matrix of a bilinear interpolation along one axis.

    Args:
      size: number of pixels of the input.
      target: number of pixels of the result.
      resize: a key of `RESIZES`.

    Returns:
      float32 [target, size]. Each row holds one or two weights of sum 1.

    Raises:
      ConfigError: an unknown `resize`.
    """
    if resize not in RESIZES:
        raise ConfigError(f"resize={resize!r}: expected one of {', '.join(RESIZES)}.")
    i = np.arange(target)
    half = 0.0 if resize == "bilinear_tf1" else 0.5
    position = np.clip((i + half) * (size / target) - half, 0, size - 1)
    low = np.floor(position).astype(int)
    matrix = np.zeros((target, size))
    matrix[i, low] = 1 - (position - low)
    matrix[i, np.minimum(low + 1, size - 1)] += position - low
    return matrix.astype(np.float32)


# -- modules ------------------------------------------------------------------------------------------------------


def convolution(
    features: int, name: str, kernel: tuple[int, int] = (1, 1), stride: int = 1, padding: str = "SAME"
) -> Callable[[Array], Array]:
    """Builds a convolution with folded normalisation, and a ReLU."""
    layer = nn.Conv(features, kernel, stride, padding, precision=jax.lax.Precision.HIGHEST, name=name)
    return lambda x: nn.relu(layer(x))


def average_pool(x: Float[ArrayLike, "B H W C"]) -> Float[Array, "B H W C"]:
    """Averages over 3 x 3 windows without their padding: [B, H, W, C] to [B, H, W, C]."""
    return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)


def max_pool(x: Float[ArrayLike, "B H W C"], stride: int = 2, padding: str = "VALID") -> Float[Array, "B _ _ C"]:
    """Computes the maximum over 3 x 3 windows: about half the size, or the same with stride 1 and padding "SAME"."""
    return nn.max_pool(x, (3, 3), (stride, stride), padding)


class BlockA(nn.Module):
    """A block on the 35 x 35 grid: [B, 35, 35, C] to [B, 35, 35, 224 + pooled].

    Attributes:
      pooled: channels of the pooling branch.
    """

    pooled: int

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "B _ _ _"]) -> Float[Array, "B _ _ _"]:
        single = convolution(64, "branch1x1")(x)
        wide = convolution(48, "branch5x5_1")(x)
        wide = convolution(64, "branch5x5_2", (5, 5))(wide)
        double = convolution(64, "branch3x3dbl_1")(x)
        double = convolution(96, "branch3x3dbl_2", (3, 3))(double)
        double = convolution(96, "branch3x3dbl_3", (3, 3))(double)
        pooled = convolution(self.pooled, "branch_pool")(average_pool(x))
        return jnp.concatenate([single, wide, double, pooled], axis=-1)


class BlockB(nn.Module):
    """A block from the 35 x 35 to the 17 x 17 grid: [B, 35, 35, C] to [B, 17, 17, 480 + C]."""

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "B _ _ _"]) -> Float[Array, "B _ _ _"]:
        single = convolution(384, "branch3x3", (3, 3), 2, "VALID")(x)
        double = convolution(64, "branch3x3dbl_1")(x)
        double = convolution(96, "branch3x3dbl_2", (3, 3))(double)
        double = convolution(96, "branch3x3dbl_3", (3, 3), 2, "VALID")(double)
        return jnp.concatenate([single, double, max_pool(x)], axis=-1)


class BlockC(nn.Module):
    """A block on the 17 x 17 grid with kernels of 7 along one axis: [B, 17, 17, 768] to [B, 17, 17, 768].

    Attributes:
      width: channels between the kernels.
    """

    width: int

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "B _ _ _"]) -> Float[Array, "B _ _ _"]:
        row, column = (1, 7), (7, 1)
        single = convolution(192, "branch1x1")(x)
        once = convolution(self.width, "branch7x7_1")(x)
        once = convolution(self.width, "branch7x7_2", row)(once)
        once = convolution(192, "branch7x7_3", column)(once)
        twice = convolution(self.width, "branch7x7dbl_1")(x)
        twice = convolution(self.width, "branch7x7dbl_2", column)(twice)
        twice = convolution(self.width, "branch7x7dbl_3", row)(twice)
        twice = convolution(self.width, "branch7x7dbl_4", column)(twice)
        twice = convolution(192, "branch7x7dbl_5", row)(twice)
        pooled = convolution(192, "branch_pool")(average_pool(x))
        return jnp.concatenate([single, once, twice, pooled], axis=-1)


class BlockD(nn.Module):
    """A block from the 17 x 17 to the 8 x 8 grid: [B, 17, 17, C] to [B, 8, 8, 512 + C]."""

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "B _ _ _"]) -> Float[Array, "B _ _ _"]:
        small = convolution(192, "branch3x3_1")(x)
        small = convolution(320, "branch3x3_2", (3, 3), 2, "VALID")(small)
        large = convolution(192, "branch7x7x3_1")(x)
        large = convolution(192, "branch7x7x3_2", (1, 7))(large)
        large = convolution(192, "branch7x7x3_3", (7, 1))(large)
        large = convolution(192, "branch7x7x3_4", (3, 3), 2, "VALID")(large)
        return jnp.concatenate([small, large, max_pool(x)], axis=-1)


class BlockE(nn.Module):
    """A block on the 8 x 8 grid: [B, 8, 8, C] to [B, 8, 8, 2048].

    Attributes:
      pool: the pooling of the last branch: the average, or the maximum in the network's last block.
    """

    pool: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "B _ _ _"]) -> Float[Array, "B _ _ _"]:
        row, column = (1, 3), (3, 1)
        single = convolution(320, "branch1x1")(x)
        once = convolution(384, "branch3x3_1")(x)
        once = convolution(384, "branch3x3_2a", row)(once), convolution(384, "branch3x3_2b", column)(once)
        twice = convolution(448, "branch3x3dbl_1")(x)
        twice = convolution(384, "branch3x3dbl_2", (3, 3))(twice)
        twice = convolution(384, "branch3x3dbl_3a", row)(twice), convolution(384, "branch3x3dbl_3b", column)(twice)
        pooled = convolution(192, "branch_pool")(self.pool(x))
        return jnp.concatenate([single, *once, *twice, pooled], axis=-1)


class Classifier(nn.Module):
    """The last layer: [B, 2048] to logits without and with bias, each [B, 1008]."""

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "B 2048"]) -> tuple[Float[Array, "B 1008"], Float[Array, "B 1008"]]:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (WIDTH, CLASSES))
        bias = self.param("bias", nn.initializers.zeros, (CLASSES,))
        logits = jnp.dot(x, kernel, precision=jax.lax.Precision.HIGHEST)
        return logits, logits + bias[None]


class Inception(nn.Module):
    """The whole network."""

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "B 299 299 3"]) -> Features:
        """Computes `Features` of preprocessed images, float32 [B, 299, 299, 3]."""
        x = convolution(32, "Conv2d_1a_3x3", (3, 3), 2, "VALID")(x)
        x = convolution(32, "Conv2d_2a_3x3", (3, 3), 1, "VALID")(x)
        x = max_pool(convolution(64, "Conv2d_2b_3x3", (3, 3))(x))
        x = convolution(80, "Conv2d_3b_1x1")(x)
        x = max_pool(convolution(192, "Conv2d_4a_3x3", (3, 3), 1, "VALID")(x))
        x = BlockA(32, name="Mixed_5b")(x)
        x = BlockA(64, name="Mixed_5c")(x)
        x = BlockA(64, name="Mixed_5d")(x)
        x = BlockB(name="Mixed_6a")(x)
        x = BlockC(128, name="Mixed_6b")(x)
        x = BlockC(160, name="Mixed_6c")(x)
        x = BlockC(160, name="Mixed_6d")(x)
        x = BlockC(192, name="Mixed_6e")(x)
        x = BlockD(name="Mixed_7a")(x)
        x = BlockE(average_pool, name="Mixed_7b")(x)
        x = BlockE(lambda x: max_pool(x, 1, "SAME"), name="Mixed_7c")(x)
        pool = x.mean((1, 2))
        unbiased_logits, logits = Classifier(name="fc")(pool)
        return Features(pool, logits, unbiased_logits)
