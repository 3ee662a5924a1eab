"""Attention patterns over the stream "text, then image grid" (DALL-E, section 2.2 and appendix B.1, figure 11).

A pattern is one small frozen object. `mask(layout)` is the truth: which key each query may read. All that makes
it fast is derived from that mask and tested against it, forward and backward:

  * `attend` (training) splits the image into groups of queries that share their image keys: a row and the rows
    before it, or a column. One float32 softmax spans the group's image keys and the text.
  * the decode cache keeps only the image positions that a later query can still read: a ring of the last W+1
    positions for row layers, the window for convolutional ones, the grid for column ones, of which a step reads
    one column.

Deviation: none in the masks. Figure 11's convolutional corner is not settled by public code, so wrap-around at
row ends is a field (`Convolutional.wrap`).

    B batch    S = T + N sequence    T text    N = h·w image tokens    H heads    K head size
    G groups of queries    Q queries in a group    L image keys of a group or of a decode cache (`decode_cache.py`)
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from dalle_jax.models.attention.patterns import ATTENDED, Pattern, group_mask
from dalle_jax.token_layout import TokenLayout

NEG = -1e30  # a finite "minus infinity": a row with nothing to read gives zeros' average, never NaN


def attend_reference(q: jax.Array, k: jax.Array, v: jax.Array, mask: np.ndarray) -> jax.Array:
    """Masked softmax attention over everything: what each fast path must equal.

    Args:
      q, k, v: [B, S, H, K].
      mask: bool [S, S].

    Returns:
      [B, S, H, K] in v's dtype.
    """
    scores = jnp.einsum("bqhk,blhk->bhql", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(jnp.asarray(mask)[None, None], scores, NEG), axis=-1)
    return jnp.einsum("bhql,blhk->bqhk", weights.astype(v.dtype), v)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, pattern: Pattern, layout: TokenLayout) -> jax.Array:
    """Attention of the whole stream under a pattern; its cost follows the pattern, not S².

    Args:
      q, k, v: [B, S, H, K].

    Returns:
      [B, S, H, K] in v's dtype.
    """
    t = layout.text_length
    text_mask = pattern.mask(layout)[:t, :t]
    text = attend_reference(q[:, :t], k[:, :t], v[:, :t], text_mask)

    image = attend_image(q[:, t:], k[:, t:], v[:, t:], k[:, :t], v[:, :t], pattern, layout)
    return checkpoint_name(jnp.concatenate([text, image], axis=1), ATTENDED)


def attend_image(q, k, v, text_k, text_v, pattern: Pattern, layout: TokenLayout) -> jax.Array:
    """The image part of `attend`.

    Args:
      q, k, v: [B, N, H, K].
      text_k, text_v: [B, T, H, K].

    Returns:
      [B, N, H, K] in v's dtype.
    """
    grid = lambda x: x.reshape(x.shape[0], layout.height, layout.width, *x.shape[2:])
    groups = functools.partial(pattern.group_keys, layout=layout)
    mask = group_mask(pattern, layout)
    image = _attend_groups(pattern.group_queries(grid(q)), groups(grid(k)), groups(grid(v)), text_k, text_v, mask)
    return pattern.ungroup(image, layout)


def _attend_groups(q, k, v, text_k, text_v, mask) -> jax.Array:
    """q [B,G,Q,H,K], k and v [B,G,L,H,K], text_k and text_v [B,T,H,K], mask [G,Q,L]; gives [B,G,Q,H,K]."""
    q = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    image = jnp.where(mask[None, :, None], dot("bgqhk,bglhk->bghql", q, k), NEG)
    text = dot("bgqhk,bthk->bghqt", q, text_k)
    # One softmax over both parts, without joining them in memory.
    peak = jax.lax.stop_gradient(jnp.maximum(image.max(-1, keepdims=True), text.max(-1, keepdims=True)))
    image, text = jnp.exp(image - peak), jnp.exp(text - peak)
    total = (image.sum(-1) + text.sum(-1)).transpose(0, 1, 3, 2)[..., None]
    out = dot("bghql,bglhk->bgqhk", image.astype(v.dtype), v) + dot("bghqt,bthk->bgqhk", text.astype(v.dtype), text_v)
    return (out / total).astype(v.dtype)


def attend_step(q, k, v, visible, text_k, text_v) -> jax.Array:
    """One image position against its decode cache and its caption.

    Args:
      q: [C·n, H, K], the n candidates of a caption side by side.
      k, v: [C·n, H, L, K], what the cache gave.
      visible: bool [L].
      text_k, text_v: [C, H, T, K], shared by the candidates.

    Returns:
      [C·n, H, K] in v's dtype.
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
