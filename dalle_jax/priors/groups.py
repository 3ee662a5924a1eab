"""Draws groups of tokens together from an autoregressive prior of other orders (RandAR, arXiv 2412.01827).

A position of this prior knows which cell it predicts next. The same position, with another next cell, predicts the
token of that cell given the same tokens. A step therefore runs the last drawn token once for each cell of a group, and
draws all tokens of the group from these predictions. The next step also runs the tokens of the group, each followed by
its successor in the order, so that the caches hold what training has seen. Each prediction is therefore exactly the
model's p(token | caption, all earlier groups). Only the dependence between tokens of one group is lost. Groups of one
token are the same draws as one token after another.

Groups grow as in RandAR and MaskGIT: after the share r of the steps, the share 1 - cos(πr/2) of the tokens is drawn. In
diagonal order the groups are anti-diagonals, see `orders.diagonal_groups`.
Known tokens come first in the order. They are not drawn, and one pass fills the caches with them.

    B rows    C captions    n candidates of a caption    T text    N image tokens    G largest group    V vocabulary
"""

from __future__ import annotations

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Int, Key, Shaped

from dalle_jax.models.dense import outputs_first
from dalle_jax.models.trunk import for_decoding
from dalle_jax.priors import orders, sampling
from dalle_jax.priors.autoregressive_model import AutoregressiveModel, AutoregressiveOptions
from dalle_jax.priors.guidance import guide
from dalle_jax.pytree import PyTree
from dalle_jax.token_layout import LONGEST_STREAM, TokenLayout

_WHOLE = 2**31 // (2 * LONGEST_STREAM)  # shares are multiples of 1 / _WHOLE: exact counts in int32 on every device
_CHUNK = 64  # known tokens that run through the model together


def drawn_before(steps: int, unknown: Int[ArrayLike, " B"]) -> Int[np.ndarray, "B _"] | Int[Array, "B _"]:
    """Computes how many tokens are drawn before each step, and in the end all of them.

    Each step draws at least one token, until none is left.

    Args:
      steps: number of steps.
      unknown: number of tokens to draw, int32 [B], in NumPy or JAX.

    Returns:
      int32 [B, steps + 1], from 0 to `unknown`.
    """
    step = np.arange(steps + 1, dtype=np.int32)
    shares = np.array([round(_WHOLE * (1 - math.cos(math.pi / 2 * t / steps))) for t in step], np.int32)
    maximum = np.maximum if isinstance(unknown, np.ndarray) else jnp.maximum
    unknown, step, shares = unknown[:, None], step[None], shares[None]
    planned = unknown * shares // _WHOLE
    return (step + maximum.accumulate(planned - step, axis=1)).clip(max=unknown)  # at least one more in each step


def drawn_before_diagonals(
    steps: int, layout: TokenLayout, cells: Int[ArrayLike, "B N"], known: Bool[ArrayLike, "B N"]
) -> Int[Array, "B _"]:
    """Computes how many unknown tokens of the diagonal order are drawn before each step, and in the end all of them.

    The groups are those of `orders.diagonal_groups` without their known cells, so that some may be empty.

    Args:
      steps: number of steps.
      layout: layout of the token stream.
      cells: the diagonal order, int32 [B, N].
      known: whether a cell is known, in raster order, bool [B, N].

    Returns:
      int32 [B, steps + 1].
    """
    unknown = ~jnp.take_along_axis(known, cells, axis=1)
    count = jnp.pad(jnp.cumsum(unknown, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
    return count[:, orders.diagonal_groups(steps, layout)]


def stretches(drawn: Int[np.ndarray, "rows _"]) -> list[tuple[int, int, int]]:
    """Splits the steps into stretches whose groups fit into the same number of places.

    In a stretch, the largest group has less than twice as many places as the stretch before it.

    Args:
      drawn: number of tokens drawn before each step and in the end, for all cases that may occur, int32 [rows, steps +
        1].

    Returns:
      First step, step after the last one, and G for each stretch. G is the size of the largest group up to the end of
      the stretch.
    """
    sizes = np.maximum.accumulate(np.diff(drawn).max(0))
    found = []
    for _, stretch in itertools.groupby(range(len(sizes)), key=lambda t: int(sizes[t]).bit_length()):
        stretch = list(stretch)
        found.append((stretch[0], stretch[-1] + 1, int(sizes[stretch[-1]])))
    return found


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def decode(
    options: AutoregressiveOptions,
    layout: TokenLayout,
    order: str,
    steps: int,
    params: PyTree,
    text: Shaped[ArrayLike, "C ..."],
    keys: Key[Array, " B"],
    known: tuple[Int[ArrayLike, "B N"], Bool[ArrayLike, "B N"]] | None,
    knobs: sampling.Knobs,
) -> Int[Array, "B N"]:
    """Implements `AutoregressivePrior.sample` with `steps`."""
    params, flat = for_decoding(params, options)
    model = AutoregressiveModel(flat, layout)
    trunk, restore = outputs_first(params["trunk"], options.trunk.dtype)
    rows, length = keys.shape[0], layout.image_length
    guided = "guidance" in knobs  # the null branch runs as additional captions
    if guided:
        text = jnp.concatenate([text, knobs["negative"]])
    twice = (lambda x: jnp.concatenate([x, x])) if guided else (lambda x: x)
    if order == "diagonal":
        spans = stretches(orders.diagonal_groups(steps, layout)[None])  # known cells make a group smaller
    else:
        spans = stretches(
            drawn_before(steps, np.arange(0 if known is not None else length, length + 1, dtype=np.int32))
        )
    most = spans[-1][-1]  # G

    cells, tokens = orders.cells(order, keys, layout), jnp.zeros((rows, length), jnp.int32)
    given = jnp.zeros(rows, jnp.int32)  # number of known tokens
    mask = jnp.zeros(cells.shape, bool) if known is None else jnp.broadcast_to(known[1], cells.shape)
    visited = cells
    if known is not None:
        cells = orders.given_first(cells, mask)
        tokens = jnp.take_along_axis(jnp.broadcast_to(known[0], cells.shape), cells, axis=1).astype(jnp.int32)
        given = mask.sum(-1, dtype=jnp.int32)
    ranks = jnp.argsort(cells, axis=1)  # the place of each cell
    if order == "diagonal":
        drawn = drawn_before_diagonals(steps, layout, visited, mask)
    else:
        drawn = drawn_before(steps, length - given)  # [B, steps + 1]

    bound = functools.partial(model.apply, {"params": params})
    last, text_cache = bound(text, method="begin")
    last = jnp.repeat(last, len(twice(keys)) // len(text), axis=0)
    before = most - 1  # slots of places before place 0, which do not exist, so that each step stores as many places
    slots = before + length

    def extend(caches, tokens, first, stored, asked):
        """Stores `stored` places from `first` on, int32 [B], and asks the last one for the tokens of `asked` places."""
        offsets = np.concatenate([np.arange(stored), np.full(asked - 1, stored - 1)])[None]
        ahead = np.concatenate([np.zeros(stored), np.arange(1, asked)]).astype(np.int32)[None]  # to the asked place
        places = first[:, None] + offsets
        seen = places - (ahead > 0)  # the last place that it sees in the cache
        at = lambda x, place: jnp.take_along_axis(x, jnp.clip(place, 0, length - 1), axis=1)
        following = at(cells, places + ahead)
        around = orders.neighbours(tokens, ranks, following, places, options.neighbour_kernel, layout)
        slot = jnp.arange(slots)[None, None] - before
        visible = (slot >= 0) & (slot <= seen[..., None])
        each = [places, at(tokens, places - 1), at(cells, places - 1), following]
        stored_params = {"params": params | {"trunk": restore(trunk)}}
        return model.apply(
            stored_params, *map(twice, each), last, text_cache, caches, twice(first + before), twice(visible),
            None if around is None else twice(around), stored, method="extend",
        )  # fmt: skip

    def step(size, carry, t):
        tokens, caches = carry
        start = given + jax.lax.dynamic_index_in_dim(drawn, t, axis=1, keepdims=False)
        end = given + jax.lax.dynamic_index_in_dim(drawn, t + 1, axis=1, keepdims=False)
        logits, caches = extend(caches, tokens, jnp.minimum(start, length - 1) - size + 1, size, size)
        if guided:
            logits = guide(logits[:rows], logits[rows:], knobs["guidance"].at((t + 1) / steps))
        places = start[:, None] + jnp.arange(size)[None]
        place_keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys, places).reshape(-1)
        flat_logits = logits.reshape(rows * size, -1)
        new = sampling.choose(flat_logits, place_keys, knobs, t / max(steps - 1, 1)).reshape(rows, size)
        places = jnp.where(places < end[:, None], places, length)  # dropped
        write = lambda row, place, token: row.at[place].set(token, mode="drop")
        return (jax.vmap(write)(tokens, places, new), caches), None

    caches = bound(len(last), slots, method="init_slots")
    if known is not None:
        chunk = min(_CHUNK, length)

        def fill(index, caches):
            first = jnp.full(rows, jnp.minimum(index * chunk, length - chunk))
            return extend(caches, tokens, first, chunk, 1)[1]

        caches = jax.lax.fori_loop(0, -(-given.max() // chunk), fill, caches)
    carry = tokens, caches
    for first, end, size in spans:
        carry, _ = jax.lax.scan(functools.partial(step, size), carry, jnp.arange(first, end))
    return orders.to_raster(carry[0], cells)
