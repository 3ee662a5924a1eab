"""Cross-attention: the positions of a stream read the states of an encoder (arXiv 1706.03762, section 3.2.3).

Parti, Muse and DALL-E mini give their captions to the image tokens in this way. Keys and values depend on the caption
alone, so that decoding computes them once for each layer.

    B = C·n rows    C captions    n candidates of a caption    M positions of the encoder    P positions of the stream
    D width    H heads    K head size
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, ArrayLike, Bool, Float

from dalle_jax.models.attention.patterns import ATTENDED, HEADS
from dalle_jax.models.attention.xla import NEG, dropped
from dalle_jax.models.dense import Dense
from dalle_jax.models.norm import Norm
from dalle_jax.models.transformer_options import TransformerOptions


class Memory(NamedTuple):
    """The states of an encoder.

    Attributes:
      states: [C, M, D].
      visible: positions that may be read, bool [C, M]; None for all. Each row has at least one.
    """

    states: Float[ArrayLike, "C M D"]
    visible: Bool[ArrayLike, "C M"] | None = None


class MemoryCache(NamedTuple):
    """Keys and values of an encoder's states in one layer.

    Attributes:
      keys, values: [C, H, M, K].
      visible: see `Memory`.
    """

    keys: Float[Array, "C H M K"]
    values: Float[Array, "C H M K"]
    visible: Bool[Array, "C M"] | None = None


class CrossAttention(nn.Module):
    """Multi-head attention from the stream to an encoder's states.

    Attributes:
      options: options of the trunk.
    """

    options: TransformerOptions

    def setup(self):
        o = self.options
        heads = (o.heads, o.size_per_head)
        bias = lambda *names: (*names, "heads", "kv") if o.qkv_bias else ()
        self.q = Dense((o.width,), heads, ("embed", "heads", "kv"), o.dtype, bias())
        self.kv = Dense((o.width,), (2, *heads), ("embed", None, "heads", "kv"), o.dtype, bias(None))
        self.out = Dense(heads, (o.width,), ("heads", "kv", "embed"), o.dtype, (None,), 0.5 / o.depth)
        if o.qk_norm:
            self.q_norm, self.k_norm = Norm("rmsnorm", o.dtype, name="q_norm"), Norm("rmsnorm", o.dtype, name="k_norm")

    def read(self, memory: Memory) -> MemoryCache:
        """Computes keys and values, which are the same for all positions of the stream."""
        k, v = checkpoint_name(tuple(jnp.moveaxis(self.kv(memory.states), -3, 0)), HEADS)
        if self.options.qk_norm:
            k = self.k_norm(k)
        return MemoryCache(k.swapaxes(1, 2), v.swapaxes(1, 2), memory.visible)

    def __call__(
        self, x: Float[ArrayLike, "B *P D"], memory: MemoryCache, *, train: bool = False, decode_step: bool = False
    ) -> Float[Array, "B *P D"]:
        """Reads the states of the encoder.

        Args:
          x: states of the stream, [C·n, P, D], or [C·n, D] for one position.
          memory: keys and values of `read`, for C captions. The n candidates of a caption are adjacent rows.
          train: whether dropout of the probabilities applies.
          decode_step: as in `Dense`.

        Returns:
          As `x`.
        """
        rows = x.reshape(-1, x.shape[-1]) if decode_step else x
        q = self.q(rows, decode_step=decode_step)
        if self.options.qk_norm:
            q = self.q_norm(q)
        captions, heads, _, size = memory.keys.shape
        q = q.reshape(captions, -1, heads, size) * jnp.asarray(size**-0.5, q.dtype)
        scores = jnp.einsum("cphk,chmk->chpm", q, memory.keys, preferred_element_type=jnp.float32)
        if memory.visible is not None:
            scores = jnp.where(memory.visible[:, None, None], scores, NEG)
        weights = jax.nn.softmax(scores, axis=-1)
        if train and self.options.attention_dropout:
            weights = dropped(weights, 0, rate=self.options.attention_dropout, key=self.make_rng("dropout"))
        y = jnp.einsum("chpm,chmk->cphk", weights.astype(memory.values.dtype), memory.values)
        y = checkpoint_name(y, ATTENDED).reshape(*rows.shape[:-1], heads, size)
        return self.out(y, decode_step=decode_step).reshape(x.shape)
