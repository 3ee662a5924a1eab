"""The transformer trunk of both priors and of BEiT: all blocks, as a scan or one by one, and the final norms.

Layers with a repeating order of patterns (row, column, row, row) run as one `nn.scan` over that unit. A scan compiles
its body once, so that 64 layers compile as fast as four. It includes the last, convolutional layer: the last layer of
the unit selects between two patterns, because both have the same parameters. Layers after the last whole unit follow
one by one.

Decoding reads each layer's weights at every token. It therefore needs them in one piece, not as slices of a stack:
`unstack` converts the parameters to the layout of `scan=False`.

    B batch    C captions    n candidates of a caption    S = T + N sequence    T text    N image tokens
    D width    H heads    K head size
"""

from __future__ import annotations

import dataclasses
import operator
from typing import TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from dalle_jax.models.attention.patterns import Pattern
from dalle_jax.models.cross_attention import Memory
from dalle_jax.models.norm import Norm
from dalle_jax.models.relative_positions import RelativePositions
from dalle_jax.models.self_attention import ImageCache
from dalle_jax.models.transformer import Block, CaptionCache
from dalle_jax.models.transformer_options import REMAT, TransformerOptions
from dalle_jax.pytree import PyTree
from dalle_jax.token_layout import TokenLayout

TRUNKS = ("trunk", "encoder")  # names of a prior's trunks in its parameters
_LONGEST_UNIT = 4
PriorOptions = TypeVar("PriorOptions")  # a dataclass with `trunk`, a `TransformerOptions`


def stacking(patterns: tuple[Pattern, ...]) -> tuple[int, int]:
    """Finds the repeating unit of layers that covers as many layers as possible.

    The last of all layers may have another pattern than its place in the unit.

    Args:
      patterns: the attention pattern of each layer.

    Returns:
      Number of layers in the unit, at most 4, and number of repeats. (0, 0) if nothing repeats.
    """
    depth, best = len(patterns), (0, 0)
    for unit in range(1, _LONGEST_UNIT + 1):
        whole = depth // unit
        repeats = next((r for r in range(whole) if patterns[r * unit : (r + 1) * unit] != patterns[:unit]), whole)
        if repeats == whole - 1 and patterns[:-1] == (patterns[:unit] * whole)[:-1]:
            repeats = whole
        if repeats > 1 and unit * repeats > best[0] * best[1]:
            best = (unit, repeats)
    return best


class Unit(nn.Module):
    """The repeated layers, which one step of the scan runs.

    Attributes:
      options: options of the trunk.
      layout: layout of the token stream.
      patterns: for each layer, the patterns that it has during the scan.
      cross: see `Block`.
    """

    options: TransformerOptions
    layout: TokenLayout
    patterns: tuple[tuple[Pattern, ...], ...]
    cross: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[ArrayLike, "B S D"],
        train: bool,
        which: Int[ArrayLike, " unit"],
        drop_rates: Float[ArrayLike, " unit"] | None,
        bias: Float[ArrayLike, "H S S"] | None,
        visible: Bool[ArrayLike, "B S"] | None,
        memory: Memory | None,
    ) -> tuple[Float[Array, "B S D"], None]:
        """Runs over the whole stream and returns the scan's carry.

        `which` has the index of each layer's pattern, and `drop_rates` its rate; see `Block`.
        """
        for i, patterns in enumerate(self.patterns):
            rate = None if drop_rates is None else drop_rates[i]
            layer = Block(self.options, self.layout, patterns, self.cross, name=f"layer_{i}")
            x = layer(x, train, which[i], rate, bias, visible, memory)
        return x, None


class Trunk(nn.Module):
    """All layers and the final norms.

    Without `scan`, the parameters of layer i are `layer_i/...`. With `scan`, those of the repeated layers are
    `units/layer_j/...` with a leading axis of repeats. `unstack` converts them.

    `init_cache`, `prefill`, `refine`, `step` and `extend` need `scan=False`.

    Attributes:
      options: options of the trunk.
      layout: layout of the token stream.
      patterns: the attention pattern of each layer.
      cross: whether all layers read an encoder's states; see `Block`.
    """

    options: TransformerOptions
    layout: TokenLayout
    patterns: tuple[Pattern, ...]
    cross: bool = False

    def setup(self):
        o = self.options
        if len(self.patterns) != o.depth:
            raise ValueError(
                f"There are {len(self.patterns)} attention patterns for {o.depth} layers; expected one per layer."
            )
        if o.positions == "relative":
            self.relative_positions = RelativePositions(o.heads, self.layout)
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
                in_axes=(nn.broadcast, 0, 0, nn.broadcast, nn.broadcast, nn.broadcast),
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(o, self.layout, tuple(known), self.cross)  # fmt: skip
        block = Block if remat is None else nn.remat(Block, policy=remat, static_argnums=(2,))
        left = range(self.scanned, o.depth)
        self.layers = [block(o, self.layout, (self.patterns[i],), self.cross, name=f"layer_{i}") for i in left]
        names = ("final_norm", "second_final_norm")[: o.final_norms]
        self.final = [Norm(o.norm, o.states_dtype, o.norm_epsilon, name=name) for name in names]

    def _states(self, x: Float[ArrayLike, "*axes D"]) -> Float[Array, "*axes D"]:
        """Applies the final norms to the residual stream, [..., D]."""
        for norm in self.final:
            x = norm(x)
        return x.astype(self.options.states_dtype)

    def __call__(
        self,
        x: Float[ArrayLike, "B S D"],
        train: bool,
        memory: Memory | None = None,
        visible: Bool[ArrayLike, "B S"] | None = None,
    ) -> Float[Array, "B S D"]:
        """Runs over the whole stream.

        Args:
          x: [B, S, D] in the stream's dtype.
          train: see `Block`.
          memory: states of an encoder; None without one.
          visible: positions that may be attended to, bool [B, S]; None for all. With it, attention is dense.

        Returns:
          [B, S, D] in the dtype of the states.
        """
        o = self.options
        bias = self.relative_positions() if o.positions == "relative" else None
        rates = jnp.linspace(0.0, o.drop_path, o.depth) if o.drop_path else None
        if self.scanned:
            scanned = None if rates is None else rates[: self.scanned].reshape(self.which.shape)
            x, _ = self.units(x, train, jnp.asarray(self.which), scanned, bias, visible, memory)
        for i, layer in enumerate(self.layers, self.scanned):
            x = layer(x, train, None, None if rates is None else rates[i], bias, visible, memory)
        return self._states(x)

    def init_cache(self, rows: int) -> list[ImageCache]:
        """Creates empty keys and values for each layer, as large as its pattern needs."""
        o = self.options
        stores = [p.cache(self.layout) for p in self.patterns]
        new = lambda store: store.init(rows, o.heads, o.size_per_head, o.dtype)
        return [(new(store), new(store)) for store in stores]

    def prefill(
        self, x: Float[ArrayLike, "C T D"], memory: Memory | None = None
    ) -> tuple[Float[Array, "C T D"], list[CaptionCache]]:
        """Runs over the positions before the image alone, [C, T, D].

        Args:
          x: [C, T, D] in the stream's dtype.
          memory: states of an encoder; None without one.

        Returns:
          States, [C, T, D], and the keys and values of each layer.
        """
        text = []
        for layer in self.layers:
            x, kv = layer.prefill(x, memory)
            text.append(kv)
        return self._states(x), text

    def refine(self, x: Float[ArrayLike, "B N D"], text: list[CaptionCache]) -> Float[Array, "B N D"]:
        """Runs over all image positions, [C·n, N, D], given the keys and values of `prefill`."""
        for layer, kv in zip(self.layers, text):
            x = layer.refine(x, kv)
        return self._states(x)

    def step(
        self,
        x: Float[ArrayLike, "B D"],
        text: list[CaptionCache],
        caches: list[ImageCache],
        position: Int[ArrayLike, ""],
    ) -> tuple[Float[Array, "B D"], list[ImageCache]]:
        """Runs over one image position.

        Args:
          x: states of the position, [C·n, D].
          text: keys and values of each layer, from `prefill`.
          caches: keys and values of the image positions before this one, for each layer.
          position: the image position, int32 scalar.

        Returns:
          States, [C·n, D], and the caches with this position.
        """
        new = []
        for layer, kv, cache in zip(self.layers, text, caches):
            x, cache = layer.step(x, kv, cache, position)
            new.append(cache)
        return self._states(x), new

    def init_slots(self, rows: int, slots: int) -> list[ImageCache]:
        """Creates empty keys and values of L slots for each layer, each [B, H, L, K], for `extend`."""
        o = self.options
        new = lambda: jnp.zeros((rows, o.heads, slots, o.size_per_head), o.dtype)
        return [(new(), new()) for _ in self.patterns]

    def extend(
        self,
        x: Float[ArrayLike, "B P D"],
        text: list[CaptionCache],
        caches: list[ImageCache],
        start: Int[ArrayLike, " B"],
        visible: Bool[ArrayLike, "B P L"],
        stored: int,
    ) -> tuple[Float[Array, "B P D"], list[ImageCache]]:
        """Runs over several positions at once, under dense attention; see `Attention.extend`."""
        new = []
        for layer, kv, cache in zip(self.layers, text, caches):
            x, cache = layer.extend(x, kv, cache, start, visible, stored)
            new.append(cache)
        return self._states(x), new


def unstack(params: PyTree) -> PyTree:
    """Converts trunk parameters of `scan=True` to the layout of `scan=False`; others are returned unchanged."""
    if "units" not in params:
        return params
    unit, repeats = len(params["units"]), len(jax.tree.leaves(params["units"])[0])
    flat = {name: sub for name, sub in params.items() if name != "units"}
    for r in range(repeats):
        for j in range(unit):
            flat[f"layer_{r * unit + j}"] = jax.tree.map(operator.itemgetter(r), params["units"][f"layer_{j}"])
    return flat


def unstacked_options(options: PriorOptions) -> PriorOptions:
    """Returns a prior's options with `scan=False` and `remat="none"`, as decoding needs."""
    return dataclasses.replace(options, trunk=dataclasses.replace(options.trunk, scan=False, remat="none"))


def for_decoding(params: PyTree, options: PriorOptions) -> tuple[PyTree, PriorOptions]:
    """Converts a prior's parameters and options to unstacked layers, once and not at every decoding step.

    Args:
      params: parameters of the prior, those of its trunk under "trunk", of an encoder under "encoder".
      options: options of the prior.

    Returns:
      Parameters and options for `scan=False` and `remat="none"`.
    """
    return params | {name: unstack(params[name]) for name in TRUNKS if name in params}, unstacked_options(options)
