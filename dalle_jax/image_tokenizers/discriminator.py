"""PatchGAN: a convolutional discriminator of overlapping patches (arXiv 1611.07004, section 3.2), as VQGAN trains it.

    pixels → convolution, leaky ReLU → (convolution, norm, leaky ReLU) x layers → convolution → one logit per patch

All kernels are 4 x 4. The first `layers` convolutions halve the resolution, and the last two keep it up to one pixel.
With three layers, a logit sees 70 x 70 pixels.

Normalisation "batch" is that of the authors' code. It always uses the statistics of the images that it is given: the
global batch, or a slice of it with gradient accumulation. No running statistics are kept, because training is the only
use of a discriminator. "group" depends on no other image.

    B batch    H, W image    C channels
"""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from dalle_jax.configuration.options import check
from dalle_jax.distributed.sharding import constrain
from dalle_jax.errors import ConfigError
from dalle_jax.image_tokenizers.patch_products import convolve

_EPSILON = 1e-5  # of the normalisation
_SLOPE = 0.2  # of the leaky ReLU below zero
_WIDEST = 8  # times `filters`
_GROUPS = 32
_PADDING = ((1, 1), (1, 1))
_DEVIATION = 0.02  # of initial weights and gains


@dataclasses.dataclass(frozen=True)
class DiscriminatorOptions:
    """Hyper-parameters of the discriminator. The defaults are those of VQGAN.

    Attributes:
      layers: number of convolutions that halve the resolution.
      filters: channels of the first convolution. They double with each layer, up to eight times as many.
      norm: "batch", "group" (up to 32 groups of channels) or "none".
      dtype: dtype of the convolutions. Parameters, normalisation and logits are float32.
    """

    layers: int = 3
    filters: int = 64
    norm: str = "batch"
    dtype: str = "float32"

    def __post_init__(self):
        choices = {"norm": ("batch", "group", "none"), "dtype": ("float32", "bfloat16")}
        check(
            self, "discriminator", positive=["layers", "filters"], most={"layers": 12, "filters": 2**14},
            choices=choices,
        )  # fmt: skip

    def check_size(self, image_size: int) -> None:
        """Checks that a square image has a patch.

        Args:
          image_size: side of the image in pixels.

        Raises:
          ConfigError: the image is too small.
        """
        if image_size < (least := 3 * 2**self.layers):
            raise ConfigError(
                f"config.discriminator.layers is {self.layers}, and the images have {image_size} pixels: expected at "
                f"least {least} pixels. Set config.discriminator.layers to {max(1, int(math.log2(image_size / 3)))} "
                "or less."
            )

    def widths(self) -> tuple[int, ...]:
        """Number of channels after each convolution but the last one."""
        return tuple(self.filters * min(2**layer, _WIDEST) for layer in range(self.layers + 1))


def discriminator_flops(options: DiscriminatorOptions, image_size: int) -> float:
    """Counts what both players compute with it for an image and its reconstruction; a multiplication counts as two.

    The forward passes of both, the gradients of the discriminator for both, and that of the reconstruction. R1 is not
    counted.
    """
    side, inputs, layers = image_size, 3, []
    for layer, width in enumerate((*options.widths(), 1)):
        side = side // 2 if layer < options.layers else side - 1
        layers.append(2 * side**2 * 16 * inputs * width)
        inputs = width
    return 7 * sum(layers) - 2 * layers[0]


class BatchNorm(nn.Module):
    """Normalises each channel by the mean and variance over the batch and all positions, in float32."""

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "B H W C"]) -> Float[Array, "B H W C"]:
        scale = self.param("scale", _partitioned(_gain, "conv_out"), (x.shape[-1],))
        bias = self.param("bias", _partitioned(nn.initializers.zeros, "conv_out"), (x.shape[-1],))
        x = x.astype(jnp.float32)
        mean = jnp.mean(x, axis=(0, 1, 2), keepdims=True)
        variance = jnp.mean((x - mean) ** 2, axis=(0, 1, 2), keepdims=True)
        return (x - mean) * jax.lax.rsqrt(variance + _EPSILON) * scale[None, None, None] + bias[None, None, None]


class Discriminator(nn.Module):
    """The discriminator.

    Attributes:
      options: hyper-parameters.
    """

    options: DiscriminatorOptions

    @nn.compact
    def __call__(self, pixels: Float[ArrayLike, "B H W 3"]) -> Float[Array, "B _ _"]:
        """Computes a logit for each patch, float32 [B, H', W'], from pixels in [-1, 1]. Real ones shall be above 0."""
        o = self.options
        x = pixels
        for layer, width in enumerate(o.widths()):
            stride = 2 if layer < o.layers else 1
            normed = layer > 0 and o.norm != "none"
            x = _convolution(width, stride, o.dtype, f"conv_{layer}", bias=not normed)(x)
            if normed:
                x = _norm(o.norm, width, f"norm_{layer}")(x)
            x = constrain(nn.leaky_relu(x, _SLOPE), "batch", None, None, None)
        return _convolution(1, 1, "float32", "output", bias=True)(x)[..., 0]


def _partitioned(init: nn.initializers.Initializer, *names: str | None) -> nn.initializers.Initializer:
    return nn.with_logical_partitioning(init, names)


def _gain(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
    return 1.0 + _DEVIATION * jax.random.normal(key, shape, dtype)


def _convolution(features: int, stride: int, dtype: str, name: str, *, bias: bool) -> nn.Module:
    """Builds a convolution of kernel 4. Weights start as N(0, 0.02), biases as 0. It trains inside of a `cond`."""
    kernel_init = _partitioned(nn.initializers.normal(_DEVIATION), None, None, "conv_in", "conv_out")
    bias_init = _partitioned(nn.initializers.zeros, "conv_out")
    return nn.Conv(
        features, (4, 4), stride, _PADDING, use_bias=bias, dtype=dtype, kernel_init=kernel_init, bias_init=bias_init,
        name=name, conv_general_dilated=convolve,
    )  # fmt: skip


def _norm(kind: str, width: int, name: str) -> nn.Module:
    if kind == "batch":
        return BatchNorm(name=name)
    return nn.GroupNorm(
        math.gcd(_GROUPS, width), epsilon=_EPSILON, dtype=jnp.float32, use_fast_variance=False, name=name,
        scale_init=_partitioned(nn.initializers.ones, "conv_out"),
        bias_init=_partitioned(nn.initializers.zeros, "conv_out"),
    )  # fmt: skip
