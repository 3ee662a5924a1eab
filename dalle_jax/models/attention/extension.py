"""Attention from several new positions at once to a decode cache, for priors that draw groups of tokens.

Some of the new positions are stored in the cache. The others are queries only: each sees the cache and itself, and no
other position sees it. They ask the model for several next tokens, given the same tokens before them.

    B rows    C captions    n candidates of a caption    P new positions, the first G of them stored    T text
    L slots of the cache    H heads    K head size
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from dalle_jax.models.attention.xla import NEG


def store(
    cache: Float[ArrayLike, "B H L K"], x: Float[ArrayLike, "B G H K"], start: Int[ArrayLike, " B"]
) -> Float[Array, "B H L K"]:
    """Stores keys or values of G positions in each row's slots from `start` on.

    Args:
      cache: [B, H, L, K].
      x: keys or values, [B, G, H, K].
      start: the first slot of each row, int32 [B], in [0, L - G].

    Returns:
      [B, H, L, K].
    """
    write = lambda one, new, first: jax.lax.dynamic_update_slice_in_dim(one, new, first, axis=1)
    return jax.vmap(write)(cache, x.swapaxes(1, 2), start)


def attend(
    q: Float[ArrayLike, "B P H K"],
    own_k: Float[ArrayLike, "B _ H K"],
    own_v: Float[ArrayLike, "B _ H K"],
    k: Float[ArrayLike, "B H L K"],
    v: Float[ArrayLike, "B H L K"],
    visible: Bool[ArrayLike, "B P L"],
    text_k: Float[ArrayLike, "C H T K"],
    text_v: Float[ArrayLike, "C H T K"],
) -> Float[Array, "B P H K"]:
    """Computes attention of new positions to the cache, to their caption, and of those not stored to themselves.

    Args:
      q: queries, [C·n, P, H, K]; the n candidates of a caption are adjacent rows.
      own_k: keys of the positions that are not stored, the last ones, [C·n, P - G, H, K].
      own_v: their values, [C·n, P - G, H, K].
      k: keys from the cache, stored ones included, [C·n, H, L, K].
      v: values from the cache, [C·n, H, L, K].
      visible: whether a query attends to a slot, bool [C·n, P, L].
      text_k: keys of the captions, [C, H, T, K], shared by the candidates; T may be 0.
      text_v: values of the captions, [C, H, T, K].

    Returns:
      [C·n, P, H, K] in the dtype of v.
    """
    rows, count, heads, size = q.shape
    captions, _, length, _ = text_k.shape
    slots, stored = k.shape[2], count - own_k.shape[1]
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    q = q * jnp.asarray(size**-0.5, q.dtype)
    shared = lambda x: x.reshape(captions, rows // captions, *x.shape[1:])
    text = dot("cnphk,chtk->cnhpt", shared(q), text_k).reshape(rows, heads, count, length)
    image = jnp.where(visible[:, None], dot("bphk,bhlk->bhpl", q, k), NEG)
    own = dot("bphk,bphk->bhp", q[:, stored:], own_k)
    own = jnp.pad(own, ((0, 0), (0, 0), (stored, 0)), constant_values=NEG)[..., None]
    weights = jax.nn.softmax(jnp.concatenate([text, image, own], axis=-1), axis=-1).astype(v.dtype)
    text, image, own = jnp.split(weights, [length, length + slots], axis=-1)
    out = dot("cnhpt,chtk->cnphk", shared(text), text_v).reshape(q.shape) + dot("bhpl,bhlk->bphk", image, v)
    out = out.at[:, stored:].add(own[:, :, stored:].swapaxes(1, 2) * own_v.astype(jnp.float32))
    return out.astype(v.dtype)
