"""A start of the vector-quantised tokenizer from training images: principal components of blocks, and clusters.

A random start takes hundreds of updates to find colours and edges, while its codes collapse onto a few. This start is
the best linear code of a single block. The encoder's linear path computes its first D principal components, the
decoder's inverts them, and the codes are clusters of the results. Training only has to improve on it.

    n images    N blocks    P subpixels of a block    D code width
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Key, UInt8

from dalle_jax.image_tokenizers.kmeans_init import kmeans
from dalle_jax.image_tokenizers.resampling import space_to_depth
from dalle_jax.image_tokenizers.signed_pixels import to_signed
from dalle_jax.image_tokenizers.vq import VQTokenizer
from dalle_jax.pytree import PyTree

_MAX_BLOCKS = 32_768  # for the clusters


def start_from_blocks(
    tokenizer: VQTokenizer, params: PyTree, images: UInt8[ArrayLike, "n H W 3"], key: Key[Array, ""]
) -> PyTree:
    """Replaces the linear paths and the codes.

    Args:
      tokenizer: the tokenizer.
      params: new parameters, unboxed.
      images: images of the training split, uint8 [n, H, W, 3].
      key: scalar key.

    Returns:
      A new tree of parameters.
    """
    block_key, kmeans_key = jax.random.split(key)
    o = tokenizer.options
    images = jax.lax.optimization_barrier(jnp.asarray(images))  # else XLA spends a minute on folding constants
    blocks = space_to_depth(to_signed(images), o.downsample).reshape(-1, o.subpixels)
    mean = jnp.mean(blocks, axis=0)
    centred = blocks - mean[None]
    variances, directions = jnp.linalg.eigh(centred.T @ centred / len(blocks))  # ascending
    basis = directions[:, ::-1][:, : o.code_dim]
    # Features of mean variance 1, so that the terms of the loss have comparable sizes on any images.
    deviation = jnp.sqrt(jnp.maximum(jnp.mean(variances[::-1][: o.code_dim]), 1e-6))

    projected = centred @ basis / deviation
    chosen = jax.random.permutation(block_key, len(projected))[:_MAX_BLOCKS]
    codes, _ = kmeans(projected[chosen], o.vocab_size, kmeans_key)
    encode = {"kernel": basis / deviation, "bias": -(mean @ basis) / deviation}
    decode = {"kernel": basis.T * deviation, "bias": mean}
    return {
        "encoder": {**params["encoder"], "linear": encode},
        "decoder": {**params["decoder"], "linear": decode},
        "codes": {**params["codes"], "vectors": codes},
    }
