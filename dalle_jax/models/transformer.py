"""One block of the transformer that both priors share, over the stream "text, then image grid".

DALL-E, section 2.2, with pre-norm blocks. The paper does not describe its block. Its gradient scaling for fp16 is not
needed in bfloat16 (footnote 12). Norm, activation, QK-norm and positions are options. `trunk.py` stacks the blocks.

    B batch    C captions    n candidates of a caption    S = T + N sequence    T text    N image tokens
    D width    H heads    K head size    F hidden width of the MLP    P = S, T or N positions
"""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, Int

from dalle_jax.configuration.options import check
from dalle_jax.distributed.sharding import constrain
from dalle_jax.errors import ConfigError
from dalle_jax.models.attention import kernels, splash
from dalle_jax.models.attention.patterns import ATTENDED, HEADS, Pattern
from dalle_jax.models.attention.xla import attend_reference, attend_step, dropped
from dalle_jax.models.dense import Dense
from dalle_jax.models.rotary import rotary_angles, rotate
from dalle_jax.token_layout import TokenLayout

NORMS = ("layernorm", "rmsnorm")
ACTIVATIONS = {
    "gelu": (functools.partial(jax.nn.gelu, approximate=False), False),
    "gelu_tanh": (functools.partial(jax.nn.gelu, approximate=True), False),
    "geglu": (functools.partial(jax.nn.gelu, approximate=False), True),
    "swiglu": (jax.nn.silu, True),
}
POSITIONS = ("learned", "rotary")
DTYPES = ("float32", "bfloat16")
_MOST = {"width": 2**16, "depth": 1024, "heads": 2**12, "head_dim": 2**12, "mlp_ratio": 2**10}  # no device holds more
TextCache = tuple[Float[Array, "C H T K"], Float[Array, "C H T K"]]  # keys and values of a layer
ImageCache = tuple[Float[Array, "..."], Float[Array, "..."]]  # the same of the image, shaped by the pattern
_KEEP = jax.checkpoint_policies
REMAT = {  # from least to most memory
    "full": _KEEP.nothing_saveable,
    "attended": _KEEP.save_only_these_names(ATTENDED),
    "attention": _KEEP.save_only_these_names(HEADS, ATTENDED),
    "dots": _KEEP.save_from_both_policies(
        _KEEP.dots_with_no_batch_dims_saveable, _KEEP.save_only_these_names(ATTENDED)
    ),
    "none": None,
}


@dataclasses.dataclass(frozen=True)
class TransformerOptions:
    """Hyper-parameters of the trunk.

    Attributes:
      width: D.
      depth: number of layers.
      heads: H.
      head_dim: K; 0 for width / heads.
      mlp_ratio: F / D.
      norm: "layernorm" or "rmsnorm", before each branch.
      activation: "gelu" (exact), "gelu_tanh" (its approximation), "geglu" or "swiglu". The last two have a gate, and so
        two input matrices.
      qk_norm: apply RMS norm with a learned gain to queries and keys.
      positions: "learned" (text position; image row + column) or "rotary" (the same coordinates, as rotations of
        queries and keys).
      dropout: dropout rate on the embeddings and on the output of each branch.
      dtype: dtype of products and activations. Parameters, norms, softmax and losses are always float32.
      float32_residual: keep the residual stream in float32: the embeddings, and the sum of all branch outputs (DALL-E,
        figure 4). The gradients along this path are then float32, too, because a gradient has the dtype of its value.
        Each branch still reads and returns `dtype`.
      float32_logits: compute logits from float32 states and float32 heads, with products in full precision (DALL-E,
        appendix D.2). Otherwise both are cast to `dtype` first; sum and result are float32 in both cases.
      remat: activations of each scanned unit that are kept for the backward pass, in addition to its input.
        "full": none, all are recomputed.
        "attended": the output of attention, so that the splash kernel does not run again.
        "attention": also queries, keys and values.
        "dots": all products of dense layers, and the output of attention.
        "none": all, nothing is recomputed.
      scan: whether repeated layers run as one scan.
      attention_kernel: implementation of attention. "xla" runs everywhere, "splash" on TPUs and "cudnn" on NVIDIA GPUs.
        "auto" chooses by device, dtype and head size (`kernels.chosen`).
      attention_dropout: dropout rate of the attention probabilities (`xla.dropped`). Training then runs `xla.attend` on
        all devices, because the other kernels never have the probabilities in memory.
    """

    width: int = 512
    depth: int = 8
    heads: int = 8
    head_dim: int = 0
    mlp_ratio: float = 4.0
    norm: str = "layernorm"
    activation: str = "gelu"
    qk_norm: bool = False
    positions: str = "learned"
    dropout: float = 0.0
    dtype: str = "bfloat16"
    float32_residual: bool = False
    float32_logits: bool = False
    remat: str = "none"
    scan: bool = True
    attention_kernel: str = "auto"
    attention_dropout: float = 0.0

    def __post_init__(self):
        choices = {"norm": NORMS, "activation": ACTIVATIONS, "positions": POSITIONS, "remat": REMAT}
        choices |= {"attention_kernel": kernels.KERNELS, "dtype": DTYPES}
        check(
            self, "model.trunk", positive=["width", "depth", "heads", "mlp_ratio"], at_least_0=["head_dim"],
            below_1=["dropout", "attention_dropout"], most=_MOST, choices=choices,
        )  # fmt: skip
        if self.attention_dropout and self.attention_kernel in ("splash", "cudnn"):
            raise ConfigError(
                f"config.model.trunk.attention_dropout is {self.attention_dropout} with attention_kernel="
                f"{self.attention_kernel!r}, which has no dropout. Set --config.model.trunk.attention_kernel=auto or "
                "attention_dropout=0."
            )
        if self.hidden < 1:
            raise ConfigError(
                f"config.model.trunk.mlp_ratio is {self.mlp_ratio}, which leaves no hidden unit at width {self.width}; "
                "expected a positive number, such as 4."
            )
        if not self.head_dim and self.width % self.heads:
            raise ConfigError(
                f"config.model.trunk.width {self.width} is not a multiple of config.model.trunk.heads {self.heads}; "
                f"change one of them: the width to {self.heads * max(round(self.width / self.heads), 1)}, for example."
            )
        if self.positions == "rotary" and self.size_per_head % 4:
            size = self.size_per_head
            raise ConfigError(f"Rotary positions need a head size (width / heads) divisible by 4, not {size}.")
        kernels.check_cudnn(self.attention_kernel, self.dtype, self.size_per_head, "model.trunk")

    @property
    def size_per_head(self) -> int:
        """K, the size of a head."""
        return self.head_dim or self.width // self.heads

    @property
    def hidden(self) -> int:
        """F, the hidden width of the MLP."""
        return int(self.width * self.mlp_ratio)

    @property
    def stream_dtype(self) -> str:
        """Dtype of the residual stream."""
        return "float32" if self.float32_residual else self.dtype

    @property
    def states_dtype(self) -> str:
        """Dtype of the states that the heads read: the output of the last norm."""
        return "float32" if self.float32_logits else self.dtype


# -- modules ------------------------------------------------------------------------------------------------------


class Norm(nn.Module):
    """Layer norm or RMS norm, computed in float32.

    Attributes:
      kind: one of `NORMS`.
      dtype: dtype of the output.
    """

    kind: str
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "*axes D"]) -> Float[Array, "*axes D"]:
        """Normalises over the last axis: [..., D] to [..., D]."""
        ones = nn.with_logical_partitioning(nn.initializers.ones, (None,))
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, (None,))
        if self.kind == "layernorm":
            norm = nn.LayerNorm(epsilon=1e-5, dtype=jnp.float32, scale_init=ones, bias_init=zeros, name="norm")
        else:
            norm = nn.RMSNorm(epsilon=1e-6, dtype=jnp.float32, scale_init=ones, name="norm")
        return norm(x).astype(self.dtype)


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
        self.qkv = Dense((o.width,), (3, *heads), ("embed", None, "heads", "kv"), o.dtype)
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
        self, x: Float[ArrayLike, "B S D"], which: Int[ArrayLike, ""] | None = None, train: bool = False
    ) -> Float[Array, "B S D"]:
        """Attends over the whole stream.

        Args:
          x: states, [B, S, D].
          which: index into `patterns`, int32 scalar; None if there is one pattern.
          train: whether dropout applies.

        Returns:
          [B, S, D].
        """
        kernel, dropping, rate = self._kernel(), {}, self.options.attention_dropout
        if train and rate:
            kernel = "xla"
            dropping = {"drop": functools.partial(dropped, rate=rate, key=self.make_rng("dropout"))}
        attention = functools.partial(kernels.attend, kernel, layout=self.layout, **dropping)
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
        t = self.layout.text_length
        q, k, v = self._heads(x, self._angles(slice(0, t)))
        out = self.out(attend_reference(q, k, v, self.pattern.mask(self.layout)[:t, :t]))
        return out, (k.swapaxes(1, 2), v.swapaxes(1, 2))

    def refine(self, x: Float[ArrayLike, "B N D"], text: TextCache) -> Float[Array, "B N D"]:
        """Attends from all image positions, [C·n, N, D], to each other and to the caption's keys and values."""
        how, t, kernel = (self.pattern, self.layout), self.layout.text_length, self._kernel()
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
        where = self.layout.text_length + position
        qkv = self.qkv(x, decode_step=True)
        q, k, v = (y[:, 0] for y in self._split(qkv[:, None], self._angles(where[None])))
        store = self.pattern.cache(self.layout)
        cache = tuple(store.write(c, y, position) for c, y in zip(cache, (k, v)))
        keys, values = (store.read(c, position) for c in cache)
        y = attend_step(q, keys, values, store.visible(position), *text)
        return self.out(y, decode_step=True), cache


class MLP(nn.Module):
    """Two dense layers; the first one has a gate if the activation has one.

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
        down = Dense((o.hidden,), (o.width,), ("mlp", "embed"), o.dtype, (None,), 0.5 / o.depth, name="down")
        return down(hidden, decode_step=decode_step)


class Block(nn.Module):
    """A pre-norm block: x + attention(norm(x)), then x + mlp(norm(x)). The methods are those of `Attention`.

    Attributes:
      options: options of the trunk.
      layout: layout of the token stream.
      patterns: see `Attention`.
    """

    options: TransformerOptions
    layout: TokenLayout
    patterns: tuple[Pattern, ...]

    def setup(self):
        o = self.options
        self.attention_norm, self.mlp_norm = Norm(o.norm, o.dtype), Norm(o.norm, o.dtype)
        self.attention = Attention(o, self.layout, self.patterns)
        self.mlp = MLP(o)
        self.drop = nn.Dropout(o.dropout)

    def __call__(
        self, x: Float[ArrayLike, "B S D"], train: bool, which: Int[ArrayLike, ""] | None = None
    ) -> Float[Array, "B S D"]:
        """Runs over the whole stream, with dropout if `train` is true."""
        x = x + self.drop(self.attention(self.attention_norm(x), which, train), deterministic=not train)
        x = x + self.drop(self.mlp(self.mlp_norm(x)), deterministic=not train)
        return constrain(x, "batch", "length", "embed_act")

    def prefill(self, x: Float[ArrayLike, "C T D"]) -> tuple[Float[Array, "C T D"], TextCache]:
        """Runs over the text alone."""
        y, kv = self.attention.prefill(self.attention_norm(x))
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), kv

    def refine(self, x: Float[ArrayLike, "B N D"], text: TextCache) -> Float[Array, "B N D"]:
        """Runs over all image positions."""
        x = x + self.attention.refine(self.attention_norm(x), text)
        return x + self.mlp(self.mlp_norm(x))

    def step(
        self, x: Float[ArrayLike, "B D"], text: TextCache, cache: ImageCache, position: Int[ArrayLike, ""]
    ) -> tuple[Float[Array, "B D"], ImageCache]:
        """Runs over one image position."""
        y, cache = self.attention.step(self.attention_norm(x), text, cache, position)
        x = x + y
        return x + self.mlp(self.mlp_norm(x), decode_step=True), cache
