"""One block of the transformer that both priors and BEiT share, over the stream "text, then image grid".

Attention is in `self_attention.py`. A block of a prior with an encoder also reads the encoder's states, by
cross-attention between its two other branches (`cross_attention.py`). The stream then has a start-of-image vector in
place of the text.

DALL-E, section 2.2. The paper does not describe its block. Its gradient scaling for fp16 is not needed in bfloat16
(footnote 12), and neither is CogView's PB-relax (arXiv 2105.13290, section 2.4). That only keeps the scores of
attention within the range of fp16 and changes no result. Norms and their places, activation, biases, QK-norm and
positions are options. `trunk.py` stacks the blocks.

    B batch    C captions    n candidates of a caption    S = T + N sequence    T text    N image tokens
    D width    H heads    K head size    F hidden width of the MLP    P = S, T or N positions
    M positions of an encoder
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from dalle_jax.distributed.sharding import constrain
from dalle_jax.models.attention.patterns import Pattern
from dalle_jax.models.cross_attention import CrossAttention, Memory, MemoryCache
from dalle_jax.models.dense import Dense
from dalle_jax.models.norm import Norm
from dalle_jax.models.self_attention import Attention, ImageCache, TextCache
from dalle_jax.models.transformer_options import ACTIVATIONS, BRANCH, TransformerOptions
from dalle_jax.token_layout import TokenLayout


class CaptionCache(NamedTuple):
    """Keys and values of captions, which a block keeps for all image positions.

    Attributes:
      prefix: keys and values of the positions before the image.
      memory: keys and values of the encoder's states; None without an encoder.
    """

    prefix: TextCache
    memory: MemoryCache | None = None


class MLP(nn.Module):
    """Two dense layers; the first one has a gate if the activation has one. NormFormer has a norm between them.

    Attributes:
      options: options of the trunk.
    """

    options: TransformerOptions

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "*axes D"], *, decode_step: bool = False) -> Float[Array, "*axes D"]:
        """Maps states, [..., D], to [..., D]; `decode_step` as in `Dense`."""
        o = self.options
        activation, gated = ACTIVATIONS[o.activation]
        up = functools.partial(Dense, (o.width,), (o.hidden,), ("embed", "mlp"), o.dtype, ("mlp",))
        hidden = activation(up(name="up")(x, decode_step=decode_step))
        if gated:
            hidden = hidden * up(name="gate")(x, decode_step=decode_step)
        if o.norm_placement == "normformer":
            hidden = Norm(o.norm, o.dtype, o.norm_epsilon, name="hidden_norm")(hidden)
        down = Dense((o.hidden,), (o.width,), ("mlp", "embed"), o.dtype, (None,), 0.5 / o.depth, name="down")
        return down(hidden, decode_step=decode_step)


class Block(nn.Module):
    """A branch of attention and a branch of MLP, each with its norms. The methods are those of `Attention`.

    Attributes:
      options: options of the trunk.
      layout: layout of the token stream.
      patterns: see `Attention`.
      cross: whether there is a branch of cross-attention between them. Each call then needs an encoder's states.
    """

    options: TransformerOptions
    layout: TokenLayout
    patterns: tuple[Pattern, ...]
    cross: bool = False

    def setup(self):
        o = self.options
        norm = functools.partial(Norm, o.norm, epsilon=o.norm_epsilon)
        read = o.stream_dtype if o.norm_placement == "post" else o.dtype
        self.attention_norm, self.mlp_norm = norm(read), norm(read)
        self.attention = Attention(o, self.layout, self.patterns)
        if self.cross:
            self.cross_norm, self.cross_attention = norm(read), CrossAttention(o)
        if o.norm_placement in ("sandwich", "normformer"):
            self.attention_out_norm = norm(o.stream_dtype)
            if self.cross:
                self.cross_out_norm = norm(o.stream_dtype)
        if o.norm_placement == "sandwich":
            self.mlp_out_norm = norm(o.stream_dtype)
        self.mlp = MLP(o)
        self.drop = nn.Dropout(o.dropout)
        if o.layer_scale:
            gain = nn.with_logical_partitioning(nn.initializers.constant(o.layer_scale), (None,))
            self.attention_scale, self.mlp_scale = (
                self.param(f"{branch}_scale", gain, (o.width,)) for branch in ("attention", "mlp")
            )
            if self.cross:
                self.cross_scale = self.param("cross_scale", gain, (o.width,))

    def _read(self, x: Float[ArrayLike, "*axes D"], branch: str) -> Float[ArrayLike, "*axes D"]:
        """Returns the input of a branch, "attention", "cross" or "mlp"."""
        return x if self.options.norm_placement == "post" else getattr(self, f"{branch}_norm")(x)

    def _add(
        self,
        x: Float[ArrayLike, "*axes D"],
        y: Float[ArrayLike, "*axes D"],
        branch: str,
        train: bool = False,
        drop_rate: Float[ArrayLike, ""] | None = None,
    ) -> Float[ArrayLike, "*axes D"]:
        """Adds the output of a branch to the residual stream. Training leaves it out for a share of the examples."""
        y = self.drop(checkpoint_name(y, BRANCH.format(branch)), deterministic=not train)
        placement = self.options.norm_placement
        if placement == "sandwich" or (placement == "normformer" and branch != "mlp"):
            y = getattr(self, f"{branch}_out_norm")(y)
        if self.options.layer_scale:
            gain = getattr(self, f"{branch}_scale").astype(y.dtype)
            y = y * gain.reshape((1,) * (y.ndim - 1) + gain.shape)
        if train and drop_rate is not None:
            shape = (y.shape[0], *(1,) * (y.ndim - 1))
            kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - drop_rate, shape)
            y = jnp.where(kept, y / jnp.asarray(1 - drop_rate, y.dtype), 0)
        return getattr(self, f"{branch}_norm")(x + y) if placement == "post" else x + y

    def _add_mlp(
        self,
        x: Float[ArrayLike, "*axes D"],
        train: bool = False,
        decode_step: bool = False,
        drop_rate: Float[ArrayLike, ""] | None = None,
    ) -> Float[ArrayLike, "*axes D"]:
        """Runs the second branch; `decode_step` as in `Dense`."""
        y = self._read(x, "mlp")
        if decode_step:
            y = y.reshape(-1, y.shape[-1])
        return self._add(x, self.mlp(y, decode_step=decode_step).reshape(x.shape), "mlp", train, drop_rate)

    def _add_cross(
        self,
        x: Float[ArrayLike, "*axes D"],
        memory: MemoryCache | None,
        train: bool = False,
        decode_step: bool = False,
        drop_rate: Float[ArrayLike, ""] | None = None,
    ) -> Float[ArrayLike, "*axes D"]:
        """Runs the branch of cross-attention, if there is one; `decode_step` as in `Dense`."""
        if not self.cross:
            return x
        y = self.cross_attention(self._read(x, "cross"), memory, train=train, decode_step=decode_step)
        return self._add(x, y, "cross", train, drop_rate)

    def __call__(
        self,
        x: Float[ArrayLike, "B S D"],
        train: bool,
        which: Int[ArrayLike, ""] | None = None,
        drop_rate: Float[ArrayLike, ""] | None = None,
        bias: Float[ArrayLike, "H S S"] | None = None,
        visible: Bool[ArrayLike, "B S"] | None = None,
        memory: Memory | None = None,
    ) -> Float[Array, "B S D"]:
        """Runs over the whole stream.

        Args:
          x: states, [B, S, D].
          train: whether dropout applies, and `drop_rate`.
          which: see `Attention`.
          drop_rate: share of the examples for which each branch is left out, scalar; None for 0.
          bias, visible: see `Attention`.
          memory: states of the encoder; None without one.

        Returns:
          [B, S, D].
        """
        y = self.attention(self._read(x, "attention"), which, train, bias, visible)
        x = self._add(x, y, "attention", train, drop_rate)
        if self.cross:
            x = self._add_cross(x, self.cross_attention.read(memory), train, drop_rate=drop_rate)
        return constrain(self._add_mlp(x, train, drop_rate=drop_rate), "batch", "length", "embed_act")

    def prefill(
        self, x: Float[ArrayLike, "C T D"], memory: Memory | None = None
    ) -> tuple[Float[Array, "C T D"], CaptionCache]:
        """Runs over the positions before the image alone."""
        y, kv = self.attention.prefill(self._read(x, "attention"))
        caption = CaptionCache(kv, self.cross_attention.read(memory) if self.cross else None)
        return self._add_mlp(self._add_cross(self._add(x, y, "attention"), caption.memory)), caption

    def refine(self, x: Float[ArrayLike, "B N D"], text: CaptionCache) -> Float[Array, "B N D"]:
        """Runs over all image positions."""
        y = self.attention.refine(self._read(x, "attention"), text.prefix)
        return self._add_mlp(self._add_cross(self._add(x, y, "attention"), text.memory))

    def step(
        self, x: Float[ArrayLike, "B D"], text: CaptionCache, cache: ImageCache, position: Int[ArrayLike, ""]
    ) -> tuple[Float[Array, "B D"], ImageCache]:
        """Runs over one image position."""
        y, cache = self.attention.step(self._read(x, "attention"), text.prefix, cache, position)
        x = self._add_cross(self._add(x, y, "attention"), text.memory, decode_step=True)
        return self._add_mlp(x, decode_step=True), cache

    def extend(
        self,
        x: Float[ArrayLike, "B P D"],
        text: CaptionCache,
        cache: ImageCache,
        start: Int[ArrayLike, " B"],
        visible: Bool[ArrayLike, "B P L"],
        stored: int,
    ) -> tuple[Float[Array, "B P D"], ImageCache]:
        """Runs over several positions at once."""
        y, cache = self.attention.extend(self._read(x, "attention"), text.prefix, cache, start, visible, stored)
        x = self._add_cross(self._add(x, y, "attention"), text.memory, decode_step=True)
        return self._add_mlp(x, decode_step=True), cache
