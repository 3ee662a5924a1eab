"""A start for the dVAE's codes from data: k-means on the encoder's own features.

Not in the paper, which trains for three million updates. In a run of a few thousand the relaxation's noise settles on
a handful of codes before the decoder has learned to use more (DALL-E, footnote 4). Here nothing changes but the
initial values: the encoder's features at initialisation, random functions of a patch, are clustered, and

    logits_k = −|f − c_k|² / (2 s²) = (c_k · f − |c_k|²/2) / s² + (the same for all k)

so that each code starts as the posterior of one cluster, and the codebook as a random projection of the centres, so
that codes that look alike are near each other for the decoder too.

    n features    F their width    V vocabulary    D width of a code's vector
"""
from __future__ import annotations

import jax
import jax.numpy as jnp

from dalle_jax.models import logit_laplace
from dalle_jax.models.dvae import DVAETokenizer, PyTree

_MAX_FEATURES = 16_384
_ROUNDS = 8


def kmeans(features: jax.Array, count: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Centres by k-means++ and Lloyd's rounds.

    Args:
      features: float32 [n, F].
      count: V, number of centres.
      key: scalar key.

    Returns:
      Centres, float32 [V, F], and the mean squared distance of a feature to its centre, float32 [].
    """
    first_key, choice_key = jax.random.split(key)
    norms = jnp.sum(features**2, axis=1)

    def distances(centre: jax.Array) -> jax.Array:
        return jnp.maximum(norms - 2 * features @ centre + centre @ centre, 0.0)

    def seed(i: jax.Array, carry: tuple[jax.Array, jax.Array]):
        centres, nearest = carry
        # A feature is chosen in proportion to its squared distance to the centres there are (all alike: any).
        chosen = jax.random.categorical(jax.random.fold_in(choice_key, i), jnp.log(nearest + 1e-12))
        centre = features[chosen]
        return centres.at[i].set(centre), jnp.minimum(nearest, distances(centre))

    start = features[jax.random.randint(first_key, (), 0, len(features))]
    centres = jnp.zeros((count, features.shape[1])).at[0].set(start)
    centres, _ = jax.lax.fori_loop(1, count, seed, (centres, distances(start)))

    def assign(centres: jax.Array) -> jax.Array:
        return jnp.argmin(jnp.sum(centres**2, axis=1)[None] - 2 * features @ centres.T, axis=1)

    def round_(_: jax.Array, centres: jax.Array) -> jax.Array:
        member = jax.nn.one_hot(assign(centres), count, dtype=jnp.float32)
        size = member.sum(0)[:, None]
        return jnp.where(size > 0, member.T @ features / jnp.maximum(size, 1), centres)

    centres = jax.lax.fori_loop(0, _ROUNDS, round_, centres)
    return centres, jnp.mean((features - centres[assign(centres)]) ** 2) * features.shape[1]


def kmeans_init(
    tokenizer: DVAETokenizer, params: PyTree, images: jax.Array, key: jax.Array, *, sharpness: float
) -> PyTree:
    """Replaces the initial values of the encoder's output layer, of the last layer of its residual branches (zero),
    and of the codebook.

    Args:
      tokenizer: the dVAE.
      params: its fresh parameters, unboxed.
      images: uint8 [B, H, W, 3], of the training split.
      key: scalar key.
      sharpness: the mean squared distance of a feature to its centre, in units of s²: how sure the first codes are.

    Returns:
      The parameters, a new tree.
    """
    feature_key, kmeans_key, projection_key = jax.random.split(key, 3)
    blocks = {name: _without_residual(part) for name, part in params["encoder"].items() if name.startswith("group_")}
    params = {**params, "encoder": {**params["encoder"], **blocks}}
    features = tokenizer.module.apply({"params": params}, logit_laplace.map_pixels(images), method="encode_features")
    features = features.reshape(-1, features.shape[-1]).astype(jnp.float32)
    features = jax.random.permutation(feature_key, features)[:_MAX_FEATURES]
    centres, spread = kmeans(features, tokenizer.vocab_size, kmeans_key)
    variance = jnp.maximum(spread, 1e-6) / sharpness

    projection = jax.random.normal(projection_key, (centres.shape[1], tokenizer.options.codebook_dim))
    vectors = (centres - centres.mean(0, keepdims=True)) @ projection
    encoder, codebook = params["encoder"], params["codebook"]
    output = {"kernel": centres.T / variance, "bias": -jnp.sum(centres**2, axis=1) / (2 * variance)}
    return {
        **params,
        "encoder": {**encoder, "output": output},
        "codebook": {**codebook, "kernel": vectors / jnp.maximum(vectors.std(), 1e-6)},
    }


def _without_residual(block: PyTree) -> PyTree:
    """A residual block's parameters with the last layer of the branch at zero."""
    return {**block, "conv_4": jax.tree.map(jnp.zeros_like, block["conv_4"])}
