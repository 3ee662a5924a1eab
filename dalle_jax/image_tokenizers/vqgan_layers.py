"""The layers of the VQGAN: convolutions, normalisation, residual blocks and attention; see `vqgan_network.py`.

B batch    H, W image or grid    h, w grid of tokens    C channels
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from dalle_jax.distributed.sharding import constrain
from dalle_jax.image_tokenizers.vqgan_options import VQGANOptions

_EPSILON = 1e-6  # of the normalisation
_SAME, _BELOW_AND_RIGHT = ((1, 1), (1, 1)), ((0, 1), (0, 1))  # padding of kernels of 3


def dense(features: int, dtype: str, name: str | None, out_axis: str = "conv_out", *, bias: bool = True) -> nn.Module:
    """Builds a convolution of kernel 1. Weights start as U(±1/√inputs), as PyTorch's do, and the bias as 0."""
    uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    kernel_init = nn.with_logical_partitioning(uniform, ("conv_in", out_axis))
    bias_init = nn.with_logical_partitioning(nn.initializers.zeros, (out_axis,))
    return nn.Dense(features, use_bias=bias, dtype=dtype, kernel_init=kernel_init, bias_init=bias_init, name=name)


def convolution(features: int, dtype: str, name: str | None, *, halve: bool = False, bias: bool = True) -> nn.Module:
    """Builds a convolution of kernel 3 that keeps or halves the resolution. Starts like `dense`."""
    uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    kernel_init = nn.with_logical_partitioning(uniform, (None, None, "conv_in", "conv_out"))
    bias_init = nn.with_logical_partitioning(nn.initializers.zeros, ("conv_out",))
    strides, padding = (2, _BELOW_AND_RIGHT) if halve else (1, _SAME)
    return nn.Conv(
        features, (3, 3), strides, padding, use_bias=bias, dtype=dtype, kernel_init=kernel_init, bias_init=bias_init,
        name=name,
    )  # fmt: skip


def group_norm(o: VQGANOptions, name: str | None) -> nn.Module:
    """Builds a normalisation over groups of channels, computed in float32."""
    scale_init = nn.with_logical_partitioning(nn.initializers.ones, ("conv_out",))
    bias_init = nn.with_logical_partitioning(nn.initializers.zeros, ("conv_out",))
    return nn.GroupNorm(
        o.norm_groups, epsilon=_EPSILON, dtype=jnp.float32, scale_init=scale_init, bias_init=bias_init,
        use_fast_variance=False, name=name,
    )  # fmt: skip


class Block(nn.Module):
    """A residual block: x + convolution(swish(norm(convolution(swish(norm(x)))))).

    Attributes:
      features: number of output channels.
      options: options of the VQGAN.
    """

    features: int
    options: VQGANOptions

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "B H W C"]) -> Float[Array, "B H W {self.features}"]:
        o = self.options
        y = convolution(self.features, o.dtype, "conv_1", bias=o.block_bias)(nn.swish(group_norm(o, "norm_1")(x)))
        y = convolution(self.features, o.dtype, "conv_2", bias=o.block_bias)(nn.swish(group_norm(o, "norm_2")(y)))
        skip = x
        if x.shape[-1] != self.features:
            skip = dense(self.features, o.dtype, "skip", bias=o.block_bias)(x if o.skip == "input" else y)
        return constrain(skip + y, "batch", None, None, None)


class Attention(nn.Module):
    """Attention of every position to all positions, with one head as wide as the level.

    Attributes:
      options: options of the VQGAN.
    """

    options: VQGANOptions

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "B H W C"]) -> Float[Array, "B H W C"]:
        o, width = self.options, x.shape[-1]
        y = group_norm(o, "norm")(x)
        query, key, value = (dense(width, o.dtype, name)(y) for name in ("query", "key", "value"))
        logits = jnp.einsum("bijc,bklc->bijkl", query, key, preferred_element_type=jnp.float32) * width**-0.5
        shares = nn.softmax(logits, axis=(-2, -1)).astype(value.dtype)
        y = jnp.einsum("bijkl,bklc->bijc", shares, value)
        return constrain(x + dense(width, o.dtype, "out")(y), "batch", None, None, None)


class Middle(nn.Module):
    """Two residual blocks, and attention between them unless `middle_attention` is false.

    Attributes:
      options: options of the VQGAN.
    """

    options: VQGANOptions

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "B h w C"]) -> Float[Array, "B h w C"]:
        o, width = self.options, x.shape[-1]
        x = Block(width, o, name="block_1")(x)
        if o.middle_attention:
            x = Attention(o, name="attention")(x)
        return Block(width, o, name="block_2")(x)
