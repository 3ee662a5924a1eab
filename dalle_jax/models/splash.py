"""Attention patterns as splash attention: JAX's block-sparse flash attention kernel for TPUs.

The kernel computes a mask block by block and passes over the blocks in which nobody reads anything; scores never leave
the chip's own memory. A pattern's mask is the truth here too:

  * the image positions stand in the order of the pattern's groups, so that a column is contiguous and column layers
    are as sparse as row layers (in raster order each of their blocks would hold something);
  * the stream is filled up to whole blocks. Nobody reads what was added; what was added reads what the last query
    reads, so that its softmax is finite, and no block is computed for it alone;
  * on a mesh each device computes its rows and its heads, as the rules of `parallel.py` lay them out.

Anywhere but on a TPU the kernel is interpreted: slow, the same numbers, for tests.

    B batch    S = T + N sequence    T text    N = h·w image tokens    H heads    K head size
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import MultiHeadMask, NumpyMask
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import (
    DEFAULT_MASK_VALUE,
    BlockSizes,
    SplashAttentionKernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import process_mask, process_mask_dkv

from dalle_jax.layout import TokenLayout
from dalle_jax.models.attention import Pattern
from dalle_jax.parallel import on_each_device, on_tpu

KERNELS = ("auto", "xla", "splash")
BLOCKS = (128, 256, 512)  # sides of the kernel's square blocks; it takes multiples of 128


def use_splash(kernel: str, pattern: Pattern) -> bool:
    """Whether a layer of this pattern uses the kernel here and now.

    Args:
      kernel: `TransformerOptions.attention_kernel`.
      pattern: of the layer.
    """
    return kernel == "splash" or (kernel == "auto" and on_tpu())


def attend(q: jax.Array, k: jax.Array, v: jax.Array, pattern: Pattern, layout: TokenLayout) -> jax.Array:
    """Attention under a pattern: of the whole stream, or of its image's queries alone.

    Args:
      q: [B, S, H, K], or [B, N, H, K].
      k, v: [B, S, H, K].

    Returns:
      q's shape and dtype.
    """
    kernel = _kernel(pattern, layout, q.shape[1], not on_tpu())

    def local(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        q = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
        out = kernel(*(_to_kernel(x, pattern, layout, _block(kernel)) for x in (q, k, v)))
        return _from_kernel(out, q.shape, pattern, layout)

    return on_each_device(local, ("batch", "length", "heads", "kv"), q, k, v)


def _to_kernel(x: jax.Array, pattern: Pattern, layout: TokenLayout, block: int) -> jax.Array:
    """[B, S', H, K] to [B·H, whole blocks, K], the image in the order of the pattern's groups."""
    b, length, h, size = x.shape
    text, image = jnp.split(x, [length - layout.image_length], axis=1)
    image = pattern.group_queries(image.reshape(b, layout.height, layout.width, h, size)).reshape(image.shape)
    x = jnp.concatenate([text, image], axis=1)
    x = jnp.pad(x, ((0, 0), (0, -length % block), (0, 0), (0, 0)))
    return x.swapaxes(1, 2).reshape(b * h, -1, size)


def _from_kernel(x: jax.Array, shape: tuple[int, ...], pattern: Pattern, layout: TokenLayout) -> jax.Array:
    """Undoes `_to_kernel`: gives an array of that shape."""
    b, length, h, size = shape
    x = x.reshape(b, h, -1, size)[:, :, :length].swapaxes(1, 2)
    text, image = jnp.split(x, [length - layout.image_length], axis=1)
    image = pattern.ungroup(image.reshape(b, *pattern.groups(layout)[0].shape, h, size), layout)
    return jnp.concatenate([text, image], axis=1)


# -- masks and blocks ---------------------------------------------------------------------------------------------


def blocked_mask(pattern: Pattern, layout: TokenLayout, queries: int, block: int) -> np.ndarray:
    """The pattern's mask as the kernel gets it: in the order of its groups, filled up to whole blocks.

    Args:
      pattern, layout: whose mask.
      queries: S, or N for those of the image alone.
      block: side of a block.

    Returns:
      bool [queries and filling, S and filling].
    """
    text = layout.text_length
    order = np.concatenate([np.arange(text), text + pattern.groups(layout)[0].reshape(-1)])
    mask = pattern.mask(layout)[np.ix_(order, order)][layout.length - queries :]
    mask = np.pad(mask, ((0, -queries % block), (0, 0)), mode="edge")
    return np.pad(mask, ((0, 0), (0, -layout.length % block)))


def filled_blocks(mask: np.ndarray, block: int) -> np.ndarray:
    """In which blocks of a mask of whole blocks anybody reads anything: bool [rows of blocks, columns of blocks]."""
    rows, columns = (size // block for size in mask.shape)
    return mask.reshape(rows, block, columns, block).any(axis=(1, 3))


def block_size(pattern: Pattern, layout: TokenLayout, queries: int) -> int:
    """The side of blocks with which a pattern costs least."""

    def cost(block: int) -> float:
        return filled_blocks(blocked_mask(pattern, layout, queries, block), block).sum() * (block**2 + 256**2)

    return min(BLOCKS, key=cost)


@functools.lru_cache(maxsize=64)
def _kernel(pattern: Pattern, layout: TokenLayout, queries: int, interpret: bool) -> SplashAttentionKernel:
    """The kernel of a pattern, for any number of heads; its tables are numpy arrays, so that any trace may use them."""
    block = block_size(pattern, layout, queries)
    masks = MultiHeadMask([NumpyMask(blocked_mask(pattern, layout, queries, block))])
    sizes = BlockSizes(
        block_q=block, block_kv=block, block_q_dq=block, block_kv_dq=block, block_q_dkv=block, block_kv_dkv=block
    )
    return SplashAttentionKernel(
        *(table(masks, (block, block))[0] for table in (process_mask, process_mask, process_mask_dkv)),
        block_sizes=sizes, is_mqa=False, save_residuals=False, mask_value=DEFAULT_MASK_VALUE, attn_logits_soft_cap=None,
        residual_checkpoint_name=None, mask_function=None, interpret=interpret,
    )  # fmt: skip


def _block(kernel: SplashAttentionKernel) -> int:
    return kernel.kwargs["block_sizes"].block_q
