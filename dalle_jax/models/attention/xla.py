"""Attention under a pattern in plain XLA operations, for any device.

`attend` serves training. Each group of queries attends to its image keys and the text, with one float32 softmax over
both. The cost therefore follows the pattern and not S². If the scores of a group would fill the memory, its queries
attend block by block, and the backward pass computes each block again. `attend_step` serves decoding: one image
position attends to its decode cache and its caption. `attend_reference` is the definition that both are tested against.

    B = C·n batch    C captions    n candidates of a caption
    S = T + N sequence    T text    N = h·w image tokens    H heads    K head size    P queries
    G groups of queries    Q queries in a group    L image keys of a group or of a decode cache
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key

from dalle_jax.models.attention.patterns import ATTENDED, Pattern, group_mask
from dalle_jax.token_layout import TokenLayout

NEG = -1e30  # finite, so that a row without any key gives no NaN
# Scores of a head and a group that are in memory at once: those of 1,024 image tokens and their text, but not of 4,096.
MOST_SCORES = 2**21
_BLOCK_SCORES = 2**20  # of a block of queries

Stream = Float[ArrayLike, "B S H K"]
Image = Float[Array, "B N H K"]
Text = Float[Array, "C T H K"]


Number = int | Int[Array, ""]
Drop = Callable[[Array, Number], Array]  # (probabilities, number of their block): `dropped`, given rate and key


def dropped(weights: Float[ArrayLike, ...], block: Number, *, rate: float, key: Key[Array, ""]) -> Float[Array, ...]:
    """Applies dropout to attention probabilities. The heads of an example share one mask.

    A mask for each head would need H times as many random numbers. MaskGIT's reference has the attention of flax, which
    shares a mask over the examples of a device as well.

    Args:
      weights: probabilities, or numbers proportional to them, [..., H, queries, keys].
      block: number of these weights among those of the layer, so that blocks differ.
      rate: probability that a weight becomes 0. The others are divided by 1 - rate.
      key: scalar key of the layer.

    Returns:
      [..., H, queries, keys], of the same expectation.
    """
    shape = (*weights.shape[:-3], 1, *weights.shape[-2:])
    kept = jax.random.bernoulli(jax.random.fold_in(key, block), 1 - rate, shape)
    return jnp.where(kept, weights / (1 - rate), 0)


def kept(weights: Array, block: Number) -> Array:
    """Is a `Drop` that drops nothing."""
    del block
    return weights


def attend_reference(
    q: Float[ArrayLike, "B P H K"],
    k: Stream,
    v: Stream,
    mask: Bool[ArrayLike, "P S"],
    drop: Drop = kept,
    bias: Float[ArrayLike, "H P S"] | None = None,
    visible: Bool[ArrayLike, "B S"] | None = None,
) -> Float[Array, "B P H K"]:
    """Computes dense masked softmax attention, the reference for the faster paths.

    Args:
      q: queries, [B, P, H, K].
      k: keys, [B, S, H, K].
      v: values, [B, S, H, K].
      mask: whether a query attends to a key, bool [P, S].
      drop: dropout of the probabilities, whose block is 0.
      bias: added to the scores of each head, float32 [H, P, S]; None for none.
      visible: whether the queries of a row may attend to a key at all, bool [B, S]; None for all keys.

    Returns:
      [B, P, H, K] in the dtype of v.
    """
    scores = jnp.einsum("bqhk,blhk->bhql", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias[None]
    allowed = jnp.asarray(mask)[None, None]
    if visible is not None:
        allowed = allowed & visible[:, None, None]
    weights = jax.nn.softmax(jnp.where(allowed, scores, NEG), axis=-1)
    return jnp.einsum("bhql,blhk->bqhk", drop(weights, 0).astype(v.dtype), v)


def attend(
    q: Stream, k: Stream, v: Stream, pattern: Pattern, layout: TokenLayout, drop: Drop = kept
) -> Float[Array, "B S H K"]:
    """Computes attention of the whole stream under a pattern.

    Args:
      q: queries, [B, S, H, K].
      k: keys, [B, S, H, K].
      v: values, [B, S, H, K].
      pattern: the attention pattern.
      layout: layout of the token stream.
      drop: dropout of the probabilities.

    Returns:
      [B, S, H, K] in the dtype of v.
    """
    t = layout.prefix_length
    text_mask = pattern.mask(layout)[:t]
    seen = slice(None) if text_mask[:, t:].any() else slice(t)  # the keys that some text position attends to
    text = attend_reference(q[:, :t], k[:, seen], v[:, seen], text_mask[:, seen], drop)
    image = attend_image(q[:, t:], k[:, t:], v[:, t:], k[:, :t], v[:, :t], pattern, layout, drop)
    return checkpoint_name(jnp.concatenate([text, image], axis=1), ATTENDED)


def attend_image(
    q: Image, k: Image, v: Image, text_k: Text, text_v: Text, pattern: Pattern, layout: TokenLayout, drop: Drop = kept
) -> Image:
    """Computes attention of the image positions under a pattern.

    Args:
      q: queries of the image, [C·n, N, H, K]; the n candidates of a caption are adjacent rows.
      k: keys of the image, [C·n, N, H, K].
      v: values of the image, [C·n, N, H, K].
      text_k: keys of the captions, [C, T, H, K], shared by the candidates.
      text_v: values of the captions, [C, T, H, K].
      pattern: the attention pattern.
      layout: layout of the token stream.
      drop: dropout of the probabilities.

    Returns:
      [C·n, N, H, K] in the dtype of v.
    """
    grid = lambda x: x.reshape(x.shape[0], layout.height, layout.width, *x.shape[2:])
    groups = functools.partial(pattern.group_keys, layout=layout)
    mask = group_mask(pattern, layout)
    given = pattern.group_queries(grid(q)), groups(grid(k)), groups(grid(v)), text_k, text_v
    return pattern.ungroup(_attend_blocks(*given, mask, drop), layout)


def _attend_blocks(
    q: Float[ArrayLike, "B G Q H K"],
    k: Float[ArrayLike, "B G L H K"],
    v: Float[ArrayLike, "B G L H K"],
    text_k: Text,
    text_v: Text,
    mask: Bool[np.ndarray, "G Q L"],
    drop: Drop,
) -> Float[Array, "B G Q H K"]:
    """Computes `_attend_groups` in blocks of queries, if all scores are too many for the memory."""
    queries, keys = q.shape[2], k.shape[2] + text_k.shape[1]
    if queries * keys <= MOST_SCORES:
        return _attend_groups(q, k, v, text_k, text_v, mask, drop)
    size = max(_BLOCK_SCORES // keys, 1)
    count = -(-queries // size)
    padding = (0, count * size - queries)  # queries whose results are cut off
    blocks = jnp.pad(q, ((0, 0), (0, 0), padding, (0, 0), (0, 0)))
    blocks = jnp.moveaxis(blocks.reshape(*q.shape[:2], count, size, *q.shape[3:]), 2, 0)
    if mask.all():
        masks = np.ones((count, 1, 1, 1), bool)
    else:
        masks = np.pad(mask, ((0, 0), padding, (0, 0))).reshape(len(mask), count, size, -1).swapaxes(0, 1)

    @jax.checkpoint
    def attend_block(block: tuple[Array, Array, Array]) -> Array:
        q, mask, number = block
        dropped = lambda weights, part: drop(weights, part + 2 * number)
        return _attend_groups(q, k, v, text_k, text_v, mask, dropped)

    out = jax.lax.map(attend_block, (blocks, jnp.asarray(masks), jnp.arange(count)))
    return jnp.moveaxis(out, 0, 2).reshape(*q.shape[:2], count * size, *q.shape[3:])[:, :, :queries]


def _attend_groups(
    q: Float[ArrayLike, "B G Q H K"],
    k: Float[ArrayLike, "B G L H K"],
    v: Float[ArrayLike, "B G L H K"],
    text_k: Text,
    text_v: Text,
    mask: Bool[ArrayLike, "#G #Q #L"],
    drop: Drop,
) -> Float[Array, "B G Q H K"]:
    """Computes attention of each group of queries to its image keys and the text."""
    q = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    candidates = lambda x: x.reshape(text_k.shape[0], -1, *x.shape[1:])
    image = jnp.where(mask[None, :, None], dot("bgqhk,bglhk->bghql", q, k), NEG)
    text = dot("cngqhk,cthk->cnghqt", candidates(q), text_k).reshape(*image.shape[:-1], -1)
    # One softmax over both parts, without a concatenation in memory.
    peak = jax.lax.stop_gradient(jnp.maximum(image.max(-1, keepdims=True), text.max(-1, keepdims=True)))
    image, text = jnp.exp(image - peak), jnp.exp(text - peak)
    total = (image.sum(-1) + text.sum(-1)).transpose(0, 1, 3, 2)[..., None]
    image, text = drop(image, 1), drop(text, 2)  # after the sum: the total is that of all probabilities
    of_text = dot("cnghqt,cthk->cngqhk", candidates(text.astype(v.dtype)), text_v).reshape(q.shape)
    out = dot("bghql,bglhk->bgqhk", image.astype(v.dtype), v) + of_text
    return (out / total).astype(v.dtype)


def attend_step(
    q: Float[ArrayLike, "B H K"],
    k: Float[ArrayLike, "B H L K"],
    v: Float[ArrayLike, "B H L K"],
    visible: Bool[ArrayLike, " L"],
    text_k: Float[ArrayLike, "C H T K"],
    text_v: Float[ArrayLike, "C H T K"],
) -> Float[Array, "B H K"]:
    """Computes attention of one image position to its decode cache and its caption.

    Args:
      q: queries, [C·n, H, K]; the n candidates of a caption are adjacent rows.
      k: keys from the decode cache, [C·n, H, L, K].
      v: values from the decode cache, [C·n, H, L, K].
      visible: whether the queries attend to a cached key, bool [L].
      text_k: keys of the captions, [C, H, T, K], shared by the candidates.
      text_v: values of the captions, [C, H, T, K].

    Returns:
      [C·n, H, K] in the dtype of v.
    """
    rows, heads, size = q.shape
    captions, _, length, _ = text_k.shape
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    q = q * jnp.asarray(size**-0.5, q.dtype)
    shared = q.reshape(captions, -1, heads, size)
    image = jnp.where(visible[None, None], dot("bhk,bhlk->bhl", q, k), NEG)
    text = dot("cnhk,chtk->cnht", shared, text_k).reshape(rows, heads, length)
    weights = jax.nn.softmax(jnp.concatenate([text, image], axis=-1), axis=-1).astype(v.dtype)
    of_text = weights[..., :length].reshape(captions, -1, heads, length)
    out = dot("cnht,chtk->cnhk", of_text, text_v).reshape(rows, heads, size)
    return (out + dot("bhl,bhlk->bhk", weights[..., length:], v)).astype(v.dtype)
