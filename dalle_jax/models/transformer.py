"""The trunk that both priors share: blocks of attention and MLP over the stream "text, then image grid".

DALL-E, section 2.2, with pre-norm blocks (the paper does not settle the block; its fp16 gradient scaling is not
needed in bfloat16, footnote 12). Norm, activation, QK-norm and positions are typed fields, so they can be compared.

Layers with a repeating order of patterns (row, column, row, row) run as one `nn.scan` over that unit, so that 64
layers compile as fast as four. The model's last layer, convolutional, is in it too: there the last layer of the unit
chooses between two patterns, which have the same parameters. What is left over follows one by one. Decoding wants each
layer's weights in one piece, not sliced out of a stack at every token: `unstack` gives the same parameters in the
layout of `scan=False`.

    B batch    S = T + N sequence    D width    H heads    K head size    F hidden width of the MLP
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from dalle_jax.distributed.sharding import constrain
from dalle_jax.models.attention import splash
from dalle_jax.models.attention.patterns import ATTENDED, HEADS, Pattern
from dalle_jax.models.attention.xla import attend, attend_image, attend_reference, attend_step
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
_KEEP = jax.checkpoint_policies
REMAT = {  # in rising order of what is kept
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
    """Sizes and choices of the trunk.

    Attributes:
      width: D.
      depth: number of layers.
      heads: H.
      head_dim: K; 0 means width / heads.
      mlp_ratio: F / D.
      norm: "layernorm" or "rmsnorm", before each branch.
      activation: "gelu" (exact), "gelu_tanh" (its usual approximation), "geglu" or "swiglu"; the last two have a gate,
        and so two input matrices.
      qk_norm: RMS-normalise queries and keys, with a learned gain.
      positions: "learned" (text position; image row + column) or "rotary" (the same coordinates, rotated into q, k).
      dropout: on the embeddings and on each branch's output.
      dtype: of the activations. Parameters, softmax, logits and losses are float32 in any case.
      remat: what is kept of each scanned unit for the gradients beside its input. "full": nothing; "attended": what
        attention gives, for which the splash kernel need not run again; "attention": queries, keys and values too;
        "dots": all products of dense layers and what attention gives; "none": everything.
      scan: run repeated layers as one scan.
      attention_kernel: "xla" (`attention.attend`), "splash" (`splash.attend`), or "auto": splash on TPUs.
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
    remat: str = "none"
    scan: bool = True
    attention_kernel: str = "auto"

    def __post_init__(self):
        choices = {"norm": NORMS, "activation": ACTIVATIONS, "positions": POSITIONS, "remat": REMAT}
        for field, known in (choices | {"attention_kernel": splash.KERNELS}).items():
            if getattr(self, field) not in known:
                given = f"model.trunk.{field} is {getattr(self, field)!r}"
                raise ValueError(f"{given}; expected one of {', '.join(known)}.")
        for field in ("width", "depth", "heads"):
            if getattr(self, field) < 1:
                raise ValueError(f"model.trunk.{field} is {getattr(self, field)}; expected at least 1.")
        if self.head_dim < 0:
            raise ValueError(f"model.trunk.head_dim is {self.head_dim}; expected a size, or 0 for width / heads.")
        if self.hidden < 1:
            raise ValueError(
                f"model.trunk.mlp_ratio is {self.mlp_ratio}, which leaves an MLP of width {self.width} no hidden unit; "
                "expected a positive number, such as 4."
            )
        if not self.head_dim and self.width % self.heads:
            raise ValueError(
                f"model.trunk.width {self.width} is not a multiple of model.trunk.heads {self.heads}; change one of "
                f"them: the width to {self.heads * max(round(self.width / self.heads), 1)}, for example."
            )
        if self.positions == "rotary" and self.size_per_head % 4:
            size = self.size_per_head
            raise ValueError(f"Rotary positions need a head size (width / heads) divisible by 4, not {size}.")

    @property
    def size_per_head(self) -> int:
        return self.head_dim or self.width // self.heads

    @property
    def hidden(self) -> int:
        return int(self.width * self.mlp_ratio)


def stacking(patterns: tuple[Pattern, ...]) -> tuple[int, int]:
    """How to fold layers into a scan: (layers in the repeated unit, repeats), covering as many layers as can be.

    The last of all layers may have another pattern than its place in the unit. Gives (0, 0) where nothing repeats.
    """
    depth, best = len(patterns), (0, 0)
    for unit in range(1, 5):
        whole = depth // unit
        repeats = next((r for r in range(whole) if patterns[r * unit : (r + 1) * unit] != patterns[:unit]), whole)
        if repeats == whole - 1 and patterns[:-1] == (patterns[:unit] * whole)[:-1]:
            repeats = whole
        if repeats > 1 and unit * repeats > best[0] * best[1]:
            best = (unit, repeats)
    return best


# -- modules ------------------------------------------------------------------------------------------------------


class Norm(nn.Module):
    """Layer norm or RMS norm, in float32. [..., D] to [..., D] in `dtype`."""

    kind: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        ones = nn.with_logical_partitioning(nn.initializers.ones, (None,))
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, (None,))
        if self.kind == "layernorm":
            norm = nn.LayerNorm(epsilon=1e-5, dtype=jnp.float32, scale_init=ones, bias_init=zeros, name="norm")
        else:
            norm = nn.RMSNorm(epsilon=1e-6, dtype=jnp.float32, scale_init=ones, name="norm")
        return norm(x).astype(self.dtype)


class Attention(nn.Module):
    """Multi-head attention, in four uses: the whole stream; its text alone, and after that one image position or all of
    them.

    Attributes:
      options, layout: of the trunk.
      patterns: who reads whom. Several where one module stands for several layers (in a scan); the whole stream only.
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

    def _heads(self, x: jax.Array, angles) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [B, S', D] to q, k, v, each [B, S', H, K]."""
        return self._split(self.qkv(x), angles)

    def _split(self, qkv: jax.Array, angles) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[B, S', 3, H, K] to q, k, v."""
        q, k, v = checkpoint_name(tuple(jnp.moveaxis(qkv, -3, 0)), HEADS)
        if self.options.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.options.positions == "rotary":
            q, k = rotate(q, angles), rotate(k, angles)
        return q, k, v

    def _angles(self, positions) -> jax.Array | None:
        return jnp.asarray(self.angles)[positions] if self.options.positions == "rotary" else None

    @property
    def pattern(self) -> Pattern:
        """The only one."""
        (pattern,) = self.patterns
        return pattern

    def __call__(self, x: jax.Array, which: jax.Array | None = None) -> jax.Array:
        """[B, S, D] to [B, S, D], by the pattern numbered `which`, int32 []."""
        kernel = splash.use_splash(self.options.attention_kernel)
        if len(self.patterns) > 1:
            attention = splash.attend_raster if kernel else attend
            ways = [functools.partial(attention, pattern=each, layout=self.layout) for each in self.patterns]
            return self.out(jax.lax.switch(which, ways, *self._heads(x, self._angles(slice(None)))))
        how = self.pattern, self.layout
        if not kernel:
            return self.out(attend(*self._heads(x, self._angles(slice(None))), *how))
        x = splash.ordered(x, *how)
        x = self.out(splash.attend(*self._heads(x, self._angles(splash.order(*how))), *how))
        return splash.restored(x, *how)

    def prefill(self, x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """The text alone, [C, T, D]; also returns its keys and values, each [C, H, T, K]."""
        t = self.layout.text_length
        q, k, v = self._heads(x, self._angles(slice(0, t)))
        out = self.out(attend_reference(q, k, v, self.pattern.mask(self.layout)[:t, :t]))
        return out, (k.swapaxes(1, 2), v.swapaxes(1, 2))

    def refine(self, x: jax.Array, text) -> jax.Array:
        """All image positions, [C·n, N, D], against each other and their caption's (keys, values)."""
        how, t = (self.pattern, self.layout), self.layout.text_length
        text = [jnp.repeat(y.swapaxes(1, 2), x.shape[0] // y.shape[0], axis=0) for y in text]
        if not splash.use_splash(self.options.attention_kernel):
            return self.out(attend_image(*self._heads(x, self._angles(slice(t, None))), *text, *how))
        q, *kv = self._heads(splash.ordered(x, *how), self._angles(splash.order(*how)[t:]))
        k, v = (jnp.concatenate(both, axis=1) for both in zip(text, kv))
        return splash.restored(self.out(splash.attend(q, k, v, *how)), *how)

    def step(self, x: jax.Array, text, cache, position: jax.Array):
        """One image position, [C·n, D], against its caption's (keys, values) and its cache, which it joins."""
        where = self.layout.text_length + position
        qkv = self.qkv(x, decode_step=True)
        q, k, v = (y[:, 0] for y in self._split(qkv[:, None], self._angles(where[None])))
        store = self.pattern.cache(self.layout)
        cache = tuple(store.write(c, y, position) for c, y in zip(cache, (k, v)))
        keys, values = (store.read(c, position) for c in cache)
        y = attend_step(q, keys, values, store.visible(position), *text)
        return self.out(y, decode_step=True), cache


class MLP(nn.Module):
    """Two dense layers, the first with a gate where the activation has one. [..., D] to [..., D]."""

    options: TransformerOptions

    @nn.compact
    def __call__(self, x: jax.Array, *, decode_step: bool = False) -> jax.Array:
        o = self.options
        activation, gated = ACTIVATIONS[o.activation]
        up = functools.partial(Dense, (o.width,), (o.hidden,), ("embed", "mlp"), o.dtype, ("mlp",))
        hidden = activation(up(name="up")(x, decode_step=decode_step))
        if gated:
            hidden = hidden * up(name="gate")(x, decode_step=decode_step)
        down = Dense((o.hidden,), (o.width,), ("mlp", "embed"), o.dtype, (None,), 0.5 / o.depth, name="down")
        return down(hidden, decode_step=decode_step)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    options: TransformerOptions
    layout: TokenLayout
    patterns: tuple[Pattern, ...]

    def setup(self):
        o = self.options
        self.attention_norm, self.mlp_norm = Norm(o.norm, o.dtype), Norm(o.norm, o.dtype)
        self.attention = Attention(o, self.layout, self.patterns)
        self.mlp = MLP(o)
        self.drop = nn.Dropout(o.dropout)

    def __call__(self, x: jax.Array, train: bool, which: jax.Array | None = None) -> jax.Array:
        """[B, S, D] to [B, S, D]; `which` as in `Attention`."""
        x = x + self.drop(self.attention(self.attention_norm(x), which), deterministic=not train)
        x = x + self.drop(self.mlp(self.mlp_norm(x)), deterministic=not train)
        return constrain(x, "batch", "length", "embed_act")

    def prefill(self, x: jax.Array):
        y, kv = self.attention.prefill(self.attention_norm(x))
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), kv

    def refine(self, x: jax.Array, text) -> jax.Array:
        x = x + self.attention.refine(self.attention_norm(x), text)
        return x + self.mlp(self.mlp_norm(x))

    def step(self, x: jax.Array, text, cache, position: jax.Array):
        y, cache = self.attention.step(self.attention_norm(x), text, cache, position)
        x = x + y
        return x + self.mlp(self.mlp_norm(x), decode_step=True), cache


class Unit(nn.Module):
    """The repeated layers that one scan step runs. Carries x, [B, S, D].

    Attributes:
      options, layout: of the trunk.
      patterns: of each layer, those it has in the course of the scan.
    """

    options: TransformerOptions
    layout: TokenLayout
    patterns: tuple[tuple[Pattern, ...], ...]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, which: jax.Array):
        for i, patterns in enumerate(self.patterns):
            x = Block(self.options, self.layout, patterns, name=f"layer_{i}")(x, train, which[i])
        return x, None


class Trunk(nn.Module):
    """All layers and the last norm.

    Parameters: with `scan`, `units/layer_j/...` with a leading axis of repeats, then `layer_i/...` for what is left
    over; without, `layer_i/...` throughout (see `unstack`).
    """

    options: TransformerOptions
    layout: TokenLayout
    patterns: tuple[Pattern, ...]

    def setup(self):
        o = self.options
        if len(self.patterns) != o.depth:
            raise ValueError(
                f"{len(self.patterns)} attention patterns for {o.depth} layers; there must be one for each."
            )
        unit, repeats = stacking(self.patterns) if o.scan else (0, 0)
        remat = REMAT[o.remat]
        self.scanned = unit * repeats
        if repeats:
            cell = Unit if remat is None else nn.remat(Unit, policy=remat, prevent_cse=False, static_argnums=(2,))
            orders = [self.patterns[i : self.scanned : unit] for i in range(unit)]  # of each layer of the unit
            known = [tuple(dict.fromkeys(order)) for order in orders]
            which = [[patterns.index(each) for each in order] for patterns, order in zip(known, orders)]
            self.which = np.asarray(which, np.int32).T  # [repeats, unit]
            self.units = nn.scan(
                cell, variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True}, length=repeats,
                in_axes=(nn.broadcast, 0), metadata_params={nn.PARTITION_NAME: "layers"},
            )(o, self.layout, tuple(known))  # fmt: skip
        block = Block if remat is None else nn.remat(Block, policy=remat, static_argnums=(2,))
        left = range(self.scanned, o.depth)
        self.layers = [block(o, self.layout, (self.patterns[i],), name=f"layer_{i}") for i in left]
        self.final_norm = Norm(o.norm, o.dtype)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, S, D] to [B, S, D]."""
        if self.scanned:
            x, _ = self.units(x, train, jnp.asarray(self.which))
        for layer in self.layers:
            x = layer(x, train)
        return self.final_norm(x)

    # Decoding: `scan=False` only.

    def init_cache(self, rows: int) -> list[tuple[jax.Array, jax.Array]]:
        """An empty (keys, values) for each layer, as large as its pattern needs."""
        o = self.options
        stores = [p.cache(self.layout) for p in self.patterns]
        new = lambda store: store.init(rows, o.heads, o.size_per_head, o.dtype)
        return [(new(store), new(store)) for store in stores]

    def prefill(self, x: jax.Array):
        """Text states [C, T, D]; returns them, and for each layer its keys and values, each [C, H, T, K]."""
        text = []
        for layer in self.layers:
            x, kv = layer.prefill(x)
            text.append(kv)
        return self.final_norm(x), text

    def refine(self, x: jax.Array, text) -> jax.Array:
        """All image positions at once: states [C·n, N, D], beside the text's keys and values from `prefill`."""
        for layer, kv in zip(self.layers, text):
            x = layer.refine(x, kv)
        return self.final_norm(x)

    def step(self, x: jax.Array, text, caches, position: jax.Array):
        """One image position: states [C·n, D], int32 []; returns the states and the caches with it written."""
        new = []
        for layer, kv, cache in zip(self.layers, text, caches):
            x, cache = layer.step(x, kv, cache, position)
            new.append(cache)
        return self.final_norm(x), new


def unstack(params):
    """Trunk parameters made with `scan` in the layout of `scan=False`. Others come back as they are."""
    if "units" not in params:
        return params
    unit, repeats = len(params["units"]), len(jax.tree.leaves(params["units"])[0])
    flat = {name: sub for name, sub in params.items() if name != "units"}
    for r in range(repeats):
        for j in range(unit):
            flat[f"layer_{r * unit + j}"] = jax.tree.map(operator.itemgetter(r), params["units"][f"layer_{j}"])
    return flat


def for_decoding(params, options):
    """A prior's parameters and options with each layer's weights in one piece: cut out of the scan's stack once, and
    not at every step.

    Args:
      params: with the trunk's under "trunk".
      options: a dataclass with a `trunk`.
    """
    flat = dataclasses.replace(options, trunk=dataclasses.replace(options.trunk, scan=False, remat="none"))
    return params | {"trunk": unstack(params["trunk"])}, flat
