"""Initialisation of the dVAE from data: k-means on the encoder's features, and the mean patch of each cluster.

The paper trains for three million updates and does not need this. A run of a few hundred updates collapses onto a
handful of codes, because the relaxation is noisy before the decoder has learned to use more (DALL-E, footnote 4).

Only the initial values change. At initialisation, the encoder's features f are random functions of a patch. They are
clustered to centres c_k with variance s², and

    logits_k = −|f − c_k|² / (2 s²) = (c_k · f − |c_k|²/2) / s² + (a term that is equal for all k)

so that each code starts as the posterior of one cluster. A code's vector starts as (max(m, 0), max(−m, 0), r). Here m
is the mean μ of its cluster's pixels, and r is a random projection of its centre. The residual branches start at zero,
and the decoder's output layer starts by reading μ from the vector. The untrained dVAE is then a vector quantiser of
patches.

    n features    F width of a feature    V vocabulary    D codebook width    P = 3 s² numbers in a patch, s the stem
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, Key, UInt8

from dalle_jax.errors import ConfigError
from dalle_jax.image_tokenizers import logit_laplace
from dalle_jax.image_tokenizers.dvae import DVAEOptions, DVAETokenizer
from dalle_jax.image_tokenizers.resampling import space_to_depth
from dalle_jax.pytree import PyTree

_MAX_FEATURES = 32_768  # with fewer features, rare patches (one shape and colour on a background) get no code
_ROUNDS = 8
_LOG_SCALE = -1.0  # initial ln b: about the error of a cluster's mean


def kmeans(
    features: Float[ArrayLike, "n F"], count: int, key: Key[Array, ""]
) -> tuple[Float[Array, "{count} F"], Int[Array, " n"]]:
    """Clusters features by k-means++ and eight of Lloyd's iterations.

    Args:
      features: float32 [n, F].
      count: V, the number of centres.
      key: scalar key.

    Returns:
      Centres, float32 [V, F], and the index of each feature's nearest centre, int32 [n].
    """
    first_key, choice_key = jax.random.split(key)
    norms = jnp.sum(features**2, axis=1)

    def distances(centre: jax.Array) -> jax.Array:
        return jnp.maximum(norms - 2 * features @ centre + centre @ centre, 0.0)

    def seed(i: jax.Array, carry: tuple[jax.Array, jax.Array]):
        centres, nearest = carry
        # The probability of a feature is proportional to its squared distance to the centres so far.
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
    return centres, assign(centres)


def kmeans_init(
    tokenizer: DVAETokenizer,
    params: PyTree,
    images: UInt8[ArrayLike, "B H W 3"],
    key: Key[Array, ""],
    *,
    sharpness: float,
) -> PyTree:
    """Replaces initial values of a dVAE by those of clusters.

    These are the codebook, the output layers of encoder and decoder, and the last layers of the residual branches. The
    last layers of the branches become zero.

    Args:
      tokenizer: the dVAE.
      params: new parameters, unboxed.
      images: images of the training split, uint8 [B, H, W, 3].
      key: scalar key.
      sharpness: mean squared distance of a feature to its centre, in units of s². Higher values give more confident
        codes.

    Returns:
      A new tree of parameters.

    Raises:
      ConfigError: a code does not stand for one block of pixels, or the dVAE is too narrow for a block.
    """
    check_sizes(tokenizer.options)
    feature_key, kmeans_key, projection_key = jax.random.split(key, 3)
    encoder, decoder = _without_residuals(params["encoder"]), _without_residuals(params["decoder"])
    mapped = logit_laplace.map_pixels(images)
    features = tokenizer.module.apply({"params": {**params, "encoder": encoder}}, mapped, method="encode_features")
    patches = space_to_depth(jnp.log(mapped) - jnp.log1p(-mapped), tokenizer.options.stem_factor)
    features, patches = (x.reshape(-1, x.shape[-1]).astype(jnp.float32) for x in (features, patches))
    chosen = jax.random.permutation(feature_key, len(features))[:_MAX_FEATURES]
    features, patches = features[chosen], patches[chosen]

    centres, nearest = kmeans(features, tokenizer.vocab_size, kmeans_key)
    spread = jnp.mean(jnp.sum((features - centres[nearest]) ** 2, axis=1))
    variance = jnp.maximum(spread, 1e-6) / sharpness
    output = {"kernel": centres.T / variance, "bias": -jnp.sum(centres**2, axis=1) / (2 * variance)}

    vectors, readout = _mean_patches(patches, nearest, centres, projection_key, tokenizer.options)
    return {
        "encoder": {**encoder, "output": output},
        "codebook": {**params["codebook"], "kernel": vectors},
        "decoder": {**decoder, "output": readout},
    }


def check_sizes(options: DVAEOptions) -> None:
    """Checks that a dVAE can be initialised from clusters.

    Raises:
      ConfigError: a code does not stand for one block of pixels, or the dVAE is too narrow for a block.
    """
    needed = 6 * options.stem_factor**2
    if options.groups != 1 or options.codebook_dim != options.hidden or options.hidden < needed:
        raise ConfigError(
            f"objective.init='kmeans' with groups={options.groups}, hidden={options.hidden}, codebook_dim="
            f"{options.codebook_dim}, stem_factor={options.stem_factor}: expected one group, and hidden = codebook_dim "
            f"of at least 6 * stem_factor² = {needed}; or use init='paper'."
        )


def _mean_patches(
    patches: Float[ArrayLike, "n P"],
    nearest: Int[ArrayLike, " n"],
    centres: Float[ArrayLike, "V F"],
    key: Key[Array, ""],
    options: DVAEOptions,
) -> tuple[Float[Array, "V D"], PyTree]:
    """Returns the vectors of the codes, and a decoder output layer that reads the mean patch from each vector."""
    count, size = options.vocab_size, patches.shape[1]
    member = jax.nn.one_hot(nearest, count, dtype=jnp.float32)
    means = member.T @ patches / jnp.maximum(member.sum(0), 1)[:, None]
    projection = jax.random.normal(key, (centres.shape[1], options.codebook_dim - 2 * size))
    rest = (centres - centres.mean(0)[None]) @ projection
    vectors = jnp.concatenate([jax.nn.relu(means), jax.nn.relu(-means), rest / jnp.maximum(rest.std(), 1e-6)], axis=1)

    # The output channels are ordered by place in the block, then μ of 3 colours, then ln b of 3 colours.
    identity = jnp.eye(size).reshape(size, size // 3, 3)
    mean_channels = jnp.concatenate([identity, jnp.zeros_like(identity)], axis=2).reshape(size, 2 * size)
    kernel = jnp.concatenate([mean_channels, -mean_channels, jnp.zeros((options.hidden - 2 * size, 2 * size))])
    scales = jnp.concatenate([jnp.zeros((size // 3, 3)), jnp.full((size // 3, 3), _LOG_SCALE)], axis=1)
    return vectors, {"kernel": kernel, "bias": scales.reshape(-1)}


def _without_residuals(part: PyTree) -> PyTree:
    """Sets the last layer of each residual branch of the encoder or decoder to zero."""
    return {
        name: {**layer, "conv_4": jax.tree.map(jnp.zeros_like, layer["conv_4"])} if name.startswith("group_") else layer
        for name, layer in part.items()
    }
