"""Vector quantisation with a straight-through gradient (VQ-VAE, arXiv 1711.00937, section 3).

A feature is replaced by the nearest code. The gradient of the decoder's input passes to the feature as if nothing had
been replaced. Two more terms train features and codes towards each other:

    commitment   ‖z − sg(e)‖²   moves the feature z to its code e
    codebook     ‖sg(z) − e‖²   moves the code to the features that it stands for

A code that no feature of a batch chose has no codebook term. `revival` moves it to the feature next to it, so that no
code stays unused for good. Everything is a function of the batch, so that training needs no state but its parameters.

N features    V codes    D width
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int


class Quantized(NamedTuple):
    """Features after quantisation.

    Attributes:
      tokens: indices of the nearest codes, int32 [N].
      vectors: the codes with the straight-through gradient, float32 [N, D].
      commitment: mean squared distance, which trains the features only, float32 scalar.
      codebook: mean squared distance, which trains the chosen codes only, float32 scalar.
      revival: the same between codes that were not chosen and the features next to them, float32 scalar.
    """

    tokens: Int[Array, " N"]
    vectors: Float[Array, "N D"]
    commitment: Float[Array, ""]
    codebook: Float[Array, ""]
    revival: Float[Array, ""]


def distances(features: Float[ArrayLike, "N D"], codes: Float[ArrayLike, "V D"]) -> Float[Array, "N V"]:
    """Computes ‖e‖² − 2 z·e: the squared distances up to a constant per feature."""
    return jnp.sum(codes**2, axis=1)[None] - 2 * features @ codes.T


def nearest(features: Float[ArrayLike, "N D"], codes: Float[ArrayLike, "V D"]) -> Int[Array, " N"]:
    """Returns the index of the code nearest to each feature, int32 [N]; the first of several."""
    return jnp.argmin(distances(features, codes), axis=1).astype(jnp.int32)


def quantize(features: Float[ArrayLike, "N D"], codes: Float[ArrayLike, "V D"]) -> Quantized:
    """Replaces features by their nearest codes.

    Args:
      features: z, float32 [N, D].
      codes: e, float32 [V, D].

    Returns:
      Tokens, vectors and the terms of the loss.
    """
    fixed_features, fixed_codes = jax.lax.stop_gradient((features, codes))
    apart = distances(fixed_features, fixed_codes)
    tokens = jnp.argmin(apart, axis=1).astype(jnp.int32)
    chosen = codes[tokens]
    vectors = features + jax.lax.stop_gradient(chosen - features)

    unused = jnp.ones(len(codes), bool).at[tokens].set(False)
    neighbour = fixed_features[jnp.argmin(apart + jnp.sum(fixed_features**2, axis=1)[:, None], axis=0)]
    return Quantized(
        tokens=tokens,
        vectors=vectors,
        commitment=jnp.mean((features - jax.lax.stop_gradient(chosen)) ** 2),
        codebook=jnp.mean((fixed_features - chosen) ** 2),
        revival=jnp.sum(jnp.where(unused[:, None], (codes - neighbour) ** 2, 0.0)) / features.size,
    )
