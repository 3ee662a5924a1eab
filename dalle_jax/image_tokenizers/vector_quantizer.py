"""Vector quantisation: a straight-through gradient, and codes that are running averages (VQ-VAE, arXiv 1711.00937).

A feature is replaced by the nearest code. The gradient of the decoder's input passes to the feature as if nothing had
been replaced. The commitment term ‖z − sg(e)‖² moves features to their codes. The codes have no gradient. Each is a
running average of the features that chose it (appendix A.1 of the paper).

A code that hardly any feature chooses is useless. It is moved next to a code with a large total error and so splits
that one in two. Codes are drawn in proportion to their errors, as in k-means++. All of it depends on sums over the
batch and on the key of the step only. Every device therefore computes the same codes.

N features    V codes    D width
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, Key

from dalle_jax.pytree import PyTree

# Distance of a moved code from its parent, in units of the distance of the parent's features. Small, because in many
# dimensions every feature is nearer to the parent than to a random neighbour as far away as the features themselves.
_SPLIT = 0.1


class Quantized(NamedTuple):
    """Features after quantisation.

    Attributes:
      tokens: indices of the nearest codes, int32 [N].
      vectors: the codes with the straight-through gradient, float32 [N, D].
      commitment: mean squared distance, which trains the features, float32 scalar.
      statistics: what `renew` needs. Statistics of equally large parts of a batch can be averaged.
    """

    tokens: Int[Array, " N"]
    vectors: Float[Array, "N D"]
    commitment: Float[Array, ""]
    statistics: dict[str, Float[Array, ...]]


def nearest(features: Float[ArrayLike, "N D"], codes: Float[ArrayLike, "V D"]) -> Int[Array, " N"]:
    """Returns the index of the code nearest to each feature, int32 [N]; the first of several."""
    distances = jnp.sum(codes**2, axis=1)[None] - 2 * features @ codes.T  # up to ‖z‖², which decides nothing
    return jnp.argmin(distances, axis=1).astype(jnp.int32)


def quantize(features: Float[ArrayLike, "N D"], codes: Float[ArrayLike, "V D"]) -> Quantized:
    """Replaces features by their nearest codes.

    Args:
      features: z, float32 [N, D].
      codes: e, float32 [V, D]; they receive no gradient.

    Returns:
      Tokens, vectors, the commitment term, and the statistics.
    """
    codes = jax.lax.stop_gradient(codes)
    fixed = jax.lax.stop_gradient(features)
    tokens = nearest(fixed, codes)
    chosen = codes[tokens]
    errors = jnp.sum((fixed - chosen) ** 2, axis=1)
    scale = len(codes) / len(fixed)  # so that a code has 1 use on average, whatever the batch
    return Quantized(
        tokens=tokens,
        vectors=features + jax.lax.stop_gradient(chosen - features),
        commitment=jnp.mean((features - chosen) ** 2),
        statistics={
            "uses": scale * jnp.zeros(len(codes)).at[tokens].add(1.0),
            "sums": scale * jnp.zeros(codes.shape).at[tokens].add(fixed),
            "errors": scale * jnp.zeros(len(codes)).at[tokens].add(errors),
        },
    )


def renew(
    codes: PyTree, statistics: PyTree, key: Key[Array, ""], *, decay: float, dead_below: float
) -> dict[str, Float[Array, ...]]:
    """Updates the codes after a batch.

    Args:
      codes: "vectors", float32 [V, D]; "uses" and "errors", float32 [V], running averages.
      statistics: of `quantize`.
      key: scalar key of this step.
      decay: weight of the old averages.
      dead_below: a code with fewer uses is moved; 1 use is the average of all codes.

    Returns:
      The new codes, a dict like `codes`. A moved code counts as having 2 * dead_below uses, so that it has time to
      find features.
    """
    uses, errors = averages(codes, statistics, decay)
    sums = decay * codes["uses"][:, None] * codes["vectors"] + (1 - decay) * statistics["sums"]
    vectors = jnp.where(uses[:, None] > 0, sums / jnp.maximum(uses, 1e-9)[:, None], codes["vectors"])
    return move_dead(vectors, uses, errors, key, dead_below)


def averages(codes: PyTree, statistics: PyTree, decay: float) -> tuple[Float[Array, " V"], Float[Array, " V"]]:
    """Returns the running averages of uses and errors after a batch, float32 [V] each. Arguments as in `renew`."""
    uses = decay * codes["uses"] + (1 - decay) * statistics["uses"]
    errors = decay * codes["errors"] + (1 - decay) * statistics["errors"]
    return uses, errors


def move_dead(
    vectors: Float[ArrayLike, "V D"],
    uses: Float[ArrayLike, " V"],
    errors: Float[ArrayLike, " V"],
    key: Key[Array, ""],
    dead_below: float,
) -> dict[str, Float[Array, ...]]:
    """Moves each code with fewer than `dead_below` uses next to a code with a large error. See `renew`."""
    parent_key, noise_key = jax.random.split(key)
    dead = uses < dead_below
    count, width = vectors.shape
    steps = jnp.cumsum(jnp.where(dead, 0.0, errors))
    parents = jnp.searchsorted(steps, jax.random.uniform(parent_key, (count,)) * steps[-1], side="right")
    parents = jnp.minimum(parents, count - 1)
    spread = jnp.sqrt(errors / jnp.maximum(uses, 1e-9) / width)[parents]
    moved = vectors[parents] + _SPLIT * spread[:, None] * jax.random.normal(noise_key, vectors.shape)
    children = jnp.zeros(count).at[parents].add(dead.astype(jnp.float32))
    return {
        "vectors": jnp.where(dead[:, None], moved, vectors),
        "uses": jnp.where(dead, 2 * dead_below, uses),
        "errors": jnp.where(dead, 0.0, errors / (1 + children)),
    }


def codebook_loss(
    features: Float[ArrayLike, "N D"], codes: Float[ArrayLike, "V D"], tokens: Int[ArrayLike, " N"]
) -> Float[Array, ""]:
    """Computes mean ‖sg(z) − e‖², which trains codes by their gradient (VQ-VAE, equation 3).

    Args:
      features: z, float32 [N, D]; they receive no gradient.
      codes: float32 [V, D].
      tokens: index of the code of each feature, int32 [N].
    """
    return jnp.mean((jax.lax.stop_gradient(features) - codes[tokens]) ** 2)


def entropy_loss(
    features: Float[ArrayLike, "N D"], codes: Float[ArrayLike, "V D"], temperature: float
) -> Float[Array, ""]:
    """Computes the mean entropy of the features' choices minus the entropy of their mean, as MaskGIT's code.

    A small value means that each feature is sure of its code, and that all codes are in use. Choices are softmax
    (−‖z − e‖² / temperature).

    Args:
      features: z, float32 [N, D].
      codes: e, float32 [V, D].
      temperature: divides the distances.
    """
    squares = jnp.sum(features**2, axis=1)[:, None] + jnp.sum(codes**2, axis=1)[None]
    logits = (2 * features @ codes.T - squares) / temperature
    log_choice = jax.nn.log_softmax(logits, axis=1)
    choice = jnp.exp(log_choice)
    mean = jnp.mean(choice, axis=0)
    return jnp.sum(mean * jnp.log(mean + 1e-5)) - jnp.mean(jnp.sum(choice * log_choice, axis=1))
