"""Self-attention of a block over the stream "text, then image grid": projections, QK-norm and rotary positions.

The scores are computed by one of the implementations in `attention/`, under the layer's attention pattern (DALL-E,
section 2.2 and appendix B.1).

    B batch    C captions    n candidates of a caption    S = T + N sequence    T text    N image tokens
    D width    H heads    K head size    P = S, T or N positions    L slots of a cache
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from dalle_jax.models.attention import extension, kernels, splash
from dalle_jax.models.attention.patterns import HEADS, Pattern
from dalle_jax.models.attention.xla import attend_reference, attend_step, dropped
from dalle_jax.models.dense import Dense
from dalle_jax.models.norm import Norm
from dalle_jax.models.rotary import rotary_angles, rotate
from dalle_jax.models.transformer_options import TransformerOptions
from dalle_jax.token_layout import TokenLayout

TextCache = tuple[Float[Array, "C H T K"], Float[Array, "C H T K"]]  # keys and values of a layer
ImageCache = tuple[Float[Array, "..."], Float[Array, "..."]]  # the same of the image, shaped by the pattern


class Attention(nn.Module):
    """Multi-head attention over the stream.

    `__call__` runs over the whole stream. `prefill` runs over the text alone. After it, `step` runs over one image
    position, and `refine` over all image positions.

    Attributes:
      options: options of the trunk.
      layout: layout of the token stream.
      patterns: the attention pattern. In a scan, one module stands for several layers and may have several patterns;
        then only `__call__` is available.
    """

    options: TransformerOptions
    layout: TokenLayout
    patterns: tuple[Pattern, ...]

    def setup(self):
        o = self.options
        heads = (o.heads, o.size_per_head)
        bias = (None, "heads", "kv") if o.qkv_bias else ()
        self.qkv = Dense((o.width,), (3, *heads), ("embed", None, "heads", "kv"), o.dtype, bias)
        self.out = Dense(heads, (o.width,), ("heads", "kv", "embed"), o.dtype, (None,), 0.5 / o.depth)
        if o.qk_norm:
            self.q_norm, self.k_norm = Norm("rmsnorm", o.dtype, name="q_norm"), Norm("rmsnorm", o.dtype, name="k_norm")
        if o.positions == "rotary":
            self.angles = rotary_angles(self.layout, o.size_per_head)

    def _heads(
        self, x: Float[ArrayLike, "B P D"], angles: Float[ArrayLike, "P _"] | None
    ) -> tuple[Float[Array, "B P H K"], Float[Array, "B P H K"], Float[Array, "B P H K"]]:
        """Projects [B, P, D] to queries, keys and values, each [B, P, H, K]."""
        return self._split(self.qkv(x), angles)

    def _split(
        self, qkv: Float[ArrayLike, "B P 3 H K"], angles: Float[ArrayLike, "P _"] | None
    ) -> tuple[Float[Array, "B P H K"], Float[Array, "B P H K"], Float[Array, "B P H K"]]:
        """Splits [B, P, 3, H, K] into queries, keys and values, with norm and rotary positions."""
        q, k, v = checkpoint_name(tuple(jnp.moveaxis(qkv, -3, 0)), HEADS)
        if self.options.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.options.positions == "rotary":
            q, k = rotate(q, angles), rotate(k, angles)
        return q, k, v

    def _angles(self, positions: slice | np.ndarray | Array) -> Float[Array, "P _"] | None:
        """Returns the rotary angles of some positions of the stream, or None without rotary positions."""
        return jnp.asarray(self.angles)[positions] if self.options.positions == "rotary" else None

    def _kernel(self) -> str:
        """Returns the implementation for the current trace: see `kernels.chosen`."""
        o = self.options
        return kernels.chosen(o.attention_kernel, o.dtype, o.size_per_head, "model.trunk")

    @property
    def pattern(self) -> Pattern:
        """The pattern, if there is exactly one."""
        (pattern,) = self.patterns
        return pattern

    def __call__(
        self,
        x: Float[ArrayLike, "B S D"],
        which: Int[ArrayLike, ""] | None = None,
        train: bool = False,
        bias: Float[ArrayLike, "H S S"] | None = None,
        visible: Bool[ArrayLike, "B S"] | None = None,
    ) -> Float[Array, "B S D"]:
        """Attends over the whole stream.

        Args:
          x: states, [B, S, D].
          which: index into `patterns`, int32 scalar; None if there is one pattern.
          train: whether dropout applies.
          bias: added to the scores, float32 [H, S, S]; None for none.
          visible: positions that may be attended to, bool [B, S]; None for all.

        Returns:
          [B, S, D].
        """
        kernel, more, rate = self._kernel(), {}, self.options.attention_dropout
        if train and rate:
            kernel = "xla"
            more = {"drop": functools.partial(dropped, rate=rate, key=self.make_rng("dropout"))}
        if bias is not None or visible is not None:
            kernel, more = "xla", {**more, "bias": bias, "visible": visible}
        attention = functools.partial(kernels.attend, kernel, layout=self.layout, **more)
        if len(self.patterns) > 1:
            ways = [functools.partial(attention, pattern=each) for each in self.patterns]
            return self.out(jax.lax.switch(which, ways, *self._heads(x, self._angles(slice(None)))))
        how = self.pattern, self.layout
        if kernel != "splash":
            return self.out(attention(*self._heads(x, self._angles(slice(None))), pattern=self.pattern))
        x = splash.ordered(x, *how)
        x = self.out(splash.attend(*self._heads(x, self._angles(splash.order(*how))), *how))
        return splash.restored(x, *how)

    def prefill(self, x: Float[ArrayLike, "C T D"]) -> tuple[Float[Array, "C T D"], TextCache]:
        """Attends over the text alone, [C, T, D]; also returns its keys and values, each [C, H, T, K]."""
        t = self.layout.prefix_length
        q, k, v = self._heads(x, self._angles(slice(0, t)))
        out = self.out(attend_reference(q, k, v, self.pattern.mask(self.layout)[:t, :t]))
        return out, (k.swapaxes(1, 2), v.swapaxes(1, 2))

    def refine(self, x: Float[ArrayLike, "B N D"], text: TextCache) -> Float[Array, "B N D"]:
        """Attends from all image positions, [C·n, N, D], to each other and to the caption's keys and values."""
        how, t, kernel = (self.pattern, self.layout), self.layout.prefix_length, self._kernel()
        text = [y.swapaxes(1, 2) for y in text]
        if kernel != "splash":
            return self.out(kernels.attend_image(kernel, *self._heads(x, self._angles(slice(t, None))), *text, *how))
        text = [jnp.repeat(y, x.shape[0] // y.shape[0], axis=0) for y in text]
        q, *kv = self._heads(splash.ordered(x, *how), self._angles(splash.order(*how)[t:]))
        k, v = (jnp.concatenate(both, axis=1) for both in zip(text, kv))
        return splash.restored(self.out(splash.attend(q, k, v, *how)), *how)

    def step(
        self, x: Float[ArrayLike, "B D"], text: TextCache, cache: ImageCache, position: Int[ArrayLike, ""]
    ) -> tuple[Float[Array, "B D"], ImageCache]:
        """Attends from one image position to the caption and the earlier image positions.

        Args:
          x: states of the position, [C·n, D].
          text: keys and values of the captions, from `prefill`.
          cache: keys and values of the image positions before this one.
          position: the image position, int32 scalar.

        Returns:
          States, [C·n, D], and the cache with this position.
        """
        where = self.layout.prefix_length + position
        qkv = self.qkv(x, decode_step=True)
        q, k, v = (y[:, 0] for y in self._split(qkv[:, None], self._angles(where[None])))
        store = self.pattern.cache(self.layout)
        cache = tuple(store.write(c, y, position) for c, y in zip(cache, (k, v)))
        keys, values = (store.read(c, position) for c in cache)
        visible = store.visible(position)[: keys.shape[2]]  # a growing cache has fewer slots, see `scan_in_stages`
        y = attend_step(q, keys, values, visible, *text)
        return self.out(y, decode_step=True), cache

    def extend(
        self,
        x: Float[ArrayLike, "B P D"],
        text: TextCache,
        cache: ImageCache,
        start: Int[ArrayLike, " B"],
        visible: Bool[ArrayLike, "B P L"],
        stored: int,
    ) -> tuple[Float[Array, "B P D"], ImageCache]:
        """Attends from several positions at once to the caption and a cache of L slots, under dense attention.

        Args:
          x: states of the positions, [C·n, P, D].
          text: keys and values of the captions, from `prefill`.
          cache: keys and values, each [C·n, H, L, K].
          start: slot of each row's first position, int32 [C·n].
          visible: whether a position attends to a slot, after storing, bool [C·n, P, L].
          stored: how many of the positions, the first ones, are stored. Each of the others also attends to itself.

        Returns:
          States, [C·n, P, D], and the cache with the stored positions.
        """
        rows, count, width = x.shape
        qkv = self.qkv(x.reshape(-1, width), decode_step=True)
        q, k, v = self._split(qkv.reshape(rows, count, *qkv.shape[1:]), None)
        cache = tuple(extension.store(c, y[:, :stored], start) for c, y in zip(cache, (k, v)))
        y = extension.attend(q, k[:, stored:], v[:, stored:], *cache, visible, *text)
        return self.out(y.reshape(-1, *y.shape[2:]), decode_step=True).reshape(x.shape), cache
