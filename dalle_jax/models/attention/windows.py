"""Attention patterns as a few calls of a dense or windowed kernel, joined into one softmax.

The flash kernels of GPUs know three masks: none, causal, and causal with a window. They are enough:

* dense causal attention is one causal call over the stream;
* bidirectional attention is two calls, of the text's queries and of the image's, without a mask;
* a row is a causal window of w + 1 positions over the image;
* a column is a causal call after a transposition of the grid, with the columns in the kernel's batch;
* the convolutional window with `wrap` is a causal window for each of its rows, with the keys shifted by that row.

The last three also attend to all text, which is one more call without a mask. The parts have one softmax: each call
returns the log-sum-exp of its scores, which weighs its output. The backward pass calls the kernel with the output and
the log-sum-exp of all parts, so that the gradients are exact. A convolutional window without `wrap` ends at the
borders of the grid, which no window over the stream does.

No candidate has a copy of its caption's keys. Candidates of a caption are one sequence of queries in that call.

    B batch    C captions    n candidates of a caption    S = T + N sequence    T text    N = h·w image tokens
    H heads    K head size    P queries    L keys
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, ArrayLike, Bool, Float

from dalle_jax.distributed.per_device import on_each_device
from dalle_jax.distributed.sharding import batch_shards
from dalle_jax.models.attention.cudnn import Kernel
from dalle_jax.models.attention.patterns import ATTENDED, Pattern, group_mask
from dalle_jax.token_layout import TokenLayout

_NAMES = ("batch", "length", "heads", "kv")
_MOST_SPANS = 8  # calls that a pattern may need for the image; the paper's convolutional window needs six
_NOTHING = -1e30  # log-sum-exp of no keys; finite, so that differences of it are not NaN

Stream = Float[ArrayLike, "B S H K"]
Image = Float[ArrayLike, "B N H K"]
Text = Float[ArrayLike, "C T H K"]
Spans = tuple[tuple[int, int], ...] | None  # (first, last) distance from the key forward to the query; None: all keys


@dataclasses.dataclass(frozen=True)
class Windows:
    """The image part of a pattern's mask as windows.

    Attributes:
      groups: number of sequences that do not attend to each other: the columns, or 1.
      spans: distances within a sequence between a query and its keys.
    """

    groups: int
    spans: Spans


@functools.lru_cache(maxsize=64)
def windows_of(pattern: Pattern, layout: TokenLayout) -> Windows | None:
    """Returns the windows of a pattern, or None if no small number of windows is its mask.

    They are read from the mask, in raster order or in the order of the pattern's groups, whichever has fewer.
    """
    t = layout.prefix_length
    found = [Windows(1, _spans(pattern.mask(layout)[t:, t:]))]
    queries, keys = pattern.groups(layout)
    if queries.shape == keys.shape and (queries == keys).all():
        masks = group_mask(pattern, layout)
        if (masks == masks[0]).all():
            found.append(Windows(len(masks), _spans(masks[0])))
    found = [each for each in found if each.spans != _NO_WINDOWS]
    return min(found, key=lambda each: len(each.spans or (None,)), default=None)


_NO_WINDOWS = ()


def _spans(mask: Bool[np.ndarray, "L L"]) -> Spans:
    """Returns the distances between queries and keys, if they are the same for all queries, or else `_NO_WINDOWS`."""
    if mask.all():
        return None
    n = len(mask)
    back = np.arange(n)[:, None] - np.arange(n)
    seen = mask[:, 0]  # at each distance, whether the first position is seen
    if not (mask == (seen[np.maximum(back, 0)] & (back >= 0))).all():
        return _NO_WINDOWS
    edges = np.flatnonzero(np.diff(np.concatenate([[False], seen, [False]])))
    spans = tuple((int(first), int(end) - 1) for first, end in edges.reshape(-1, 2))
    return spans if len(spans) <= _MOST_SPANS else _NO_WINDOWS


@functools.lru_cache(maxsize=64)
def _stream_spans(pattern: Pattern, layout: TokenLayout) -> tuple[Spans, Spans]:
    """Returns the distances within the whole stream, and within the text."""
    t, mask = layout.prefix_length, pattern.mask(layout)
    return _spans(mask), _spans(mask[:t, :t])


# -- attention ----------------------------------------------------------------------------------------------------


def attend(
    q: Stream, k: Stream, v: Stream, pattern: Pattern, layout: TokenLayout, kernel: Kernel
) -> Float[Array, "B S H K"]:
    """Computes attention of the whole stream under a pattern that has windows (`windows_of`).

    Args:
      q: queries in raster order, [B, S, H, K].
      k: keys in raster order, [B, S, H, K].
      v: values in raster order, [B, S, H, K].
      pattern: the attention pattern.
      layout: layout of the token stream.
      kernel: computes the parts.

    Returns:
      Array of the shape and dtype of q.
    """
    t, image = layout.prefix_length, windows_of(pattern, layout)
    whole, of_text = _stream_spans(pattern, layout)

    def local(q: Array, k: Array, v: Array) -> Array:
        if whole != _NO_WINDOWS:
            return _joined(kernel, whole, 1, q, k, v, None)
        text = _joined(kernel, of_text, 1, *(x[:, :t] for x in (q, k, v)), None)
        if image == Windows(1, None):
            out = _joined(kernel, None, 1, q[:, t:], k, v, None)
        else:
            out = _grouped(*(x[:, t:] for x in (q, k, v)), (k[:, :t], v[:, :t]), pattern, layout, kernel)
        return jnp.concatenate([text, out], axis=1)

    return on_each_device(local, _NAMES, q, k, v)


def attend_image(
    q: Image, k: Image, v: Image, text_k: Text, text_v: Text, pattern: Pattern, layout: TokenLayout, kernel: Kernel
) -> Float[Array, "B N H K"]:
    """Computes attention of the image positions, under a pattern that has windows, to each other and to the text.

    Args:
      q: queries of the image, [C·n, N, H, K].
      k: keys of the image, [C·n, N, H, K].
      v: values of the image, [C·n, N, H, K].
      text_k: keys of the captions, [C, T, H, K].
      text_v: values of the captions, [C, T, H, K].
      pattern: the attention pattern.
      layout: layout of the token stream.
      kernel: computes the parts.

    Returns:
      Array of the shape and dtype of q.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if text_k.shape[0] % batch_shards(None if mesh.empty else mesh):  # devices would share a caption
        text_k, text_v = (jnp.repeat(x, q.shape[0] // x.shape[0], axis=0) for x in (text_k, text_v))

    def local(q: Array, k: Array, v: Array, text_k: Array, text_v: Array) -> Array:
        return _grouped(q, k, v, (text_k, text_v), pattern, layout, kernel)

    return on_each_device(local, _NAMES, q, k, v, text_k, text_v)


def attend_sequence(q: Stream, k: Stream, v: Stream, causal: bool, kernel: Kernel) -> Float[Array, "B S H K"]:
    """Computes dense attention of a sequence, [B, S, H, K], to itself, with or without a causal mask."""
    spans = ((0, q.shape[1] - 1),) if causal else None
    return on_each_device(lambda *x: _joined(kernel, spans, 1, *x, None), _NAMES, q, k, v)


def _grouped(
    q: Array, k: Array, v: Array, text: tuple[Array, Array], pattern: Pattern, layout: TokenLayout, kernel: Kernel
) -> Array:
    """Sorts the image by groups, attends within them and to the text, and sorts back."""
    image = windows_of(pattern, layout)
    if image.groups == 1:
        return _joined(kernel, image.spans, 1, q, k, v, text)
    grid = lambda x: x.reshape(x.shape[0], layout.height, layout.width, *x.shape[2:])
    given = (pattern.group_queries(grid(x)).reshape(x.shape) for x in (q, k, v))
    out = _joined(kernel, image.spans, image.groups, *given, text)
    return pattern.ungroup(out.reshape(q.shape[0], image.groups, -1, *q.shape[2:]), layout)


# -- one softmax over parts ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Part:
    """One call of the kernel: the keys at some distances before the queries, or all keys.

    Attributes:
      rows: size of the kernel's batch.
      first: the smallest distance; that many queries have no key in this part.
      causal: see `Kernel`.
      window: see `Kernel`.
    """

    rows: int
    first: int = 0
    causal: bool = False
    window: int | None = None

    def queries(self, x: Array) -> Array:
        """Returns the queries with keys: [B, P, ...] to [rows, P, ...]."""
        return x.reshape(self.rows, -1, *x.shape[2:])[:, self.first :]

    def keys(self, x: Array) -> Array:
        """Returns the keys with queries: [B, L, ...] to [rows, L, ...]."""
        x = x.reshape(self.rows, -1, *x.shape[2:])
        return x[:, : x.shape[1] - self.first]

    def of_queries(self, x: Array, shape: tuple[int, ...], fill: float = 0.0) -> Array:
        """Fills the queries without keys, and returns the array in `shape`, [B, P, ...]."""
        return self._padded(x, (self.first, 0), fill).reshape(shape)

    def of_keys(self, x: Array, shape: tuple[int, ...]) -> Array:
        """Fills the keys without queries with zeros, and returns the array in `shape`, [B, L, ...]."""
        return self._padded(x, (0, self.first), 0.0).reshape(shape)

    def _padded(self, x: Array, width: tuple[int, int], fill: float) -> Array:
        return jnp.pad(x, ((0, 0), width, *[(0, 0)] * (x.ndim - 2)), constant_values=fill) if any(width) else x


def _parts(spans: Spans, groups: int, q: Array) -> list[_Part]:
    """Returns the calls for the image. All queries of a row have the length of its keys, unless `spans` is None."""
    rows, length = q.shape[0] * groups, q.shape[1] // groups
    if spans is None:
        return [_Part(rows)]
    window = lambda first, last: None if last >= length - 1 else last - first + 1
    return [_Part(rows, first, True, window(first, last)) for first, last in spans if first < length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _joined(
    kernel: Kernel, spans: Spans, groups: int, q: Array, k: Array, v: Array, text: tuple[Array, Array] | None
) -> Array:
    """Computes attention to the keys within `spans` and to all keys of the text.

    Args:
      kernel: computes the parts.
      spans: distances between a query and its keys.
      groups: number of adjacent sequences in each row, which do not attend to each other.
      q: queries, [B, P, H, K].
      k: keys, [B, L, H, K].
      v: values, [B, L, H, K].
      text: keys and values of the text, [C, T, H, K] each with B a multiple of C, or None.

    Returns:
      [B, P, H, K] in the dtype of q.
    """
    return _joined_forward(kernel, spans, groups, q, k, v, text)[0]


def _joined_forward(kernel, spans, groups, q, k, v, text):
    found = []
    for part, keys, values in _calls(spans, groups, q, k, v, text):
        out, lse = kernel.forward(part.queries(q), part.keys(keys), part.keys(values), part.causal, part.window)
        found.append((part.of_queries(out, q.shape), part.of_queries(lse, q.shape[:3], _NOTHING)))
    out, lse = found[0]
    if len(found) > 1:
        lse = functools.reduce(jnp.logaddexp, [each for _, each in found])
        out = _total([jnp.exp(each - lse)[..., None] * x for x, each in found], q.dtype)
    out, lse = checkpoint_name((out, lse), ATTENDED)
    return out, (q, k, v, text, out, lse)


def _joined_backward(kernel, spans, groups, kept, cotangent):
    q, k, v, text, out, lse = kept
    of_queries, of_keys = [], []
    for part, keys, values in _calls(spans, groups, q, k, v, text):
        given = (part.queries(q), part.keys(keys), part.keys(values), *map(part.queries, (out, lse, cotangent)))
        dq, *others = kernel.backward(*given, part.causal, part.window)
        of_queries.append(part.of_queries(dq, q.shape))
        of_keys.append(tuple(part.of_keys(x, keys.shape) for x in others))
    of_text = None if text is None else of_keys.pop()
    dk, dv = (_total(list(each), q.dtype) for each in zip(*of_keys))
    return _total(of_queries, q.dtype), dk, dv, of_text


_joined.defvjp(_joined_forward, _joined_backward)


def _calls(spans, groups, q, k, v, text) -> list[tuple[_Part, Array, Array]]:
    """Returns each part with its keys and values. The candidates of a caption are one row of the text's call."""
    calls = [(part, k, v) for part in _parts(spans, groups, q)]
    return calls if text is None else [*calls, (_Part(text[0].shape[0]), *text)]


def _total(parts: list[Array], dtype: np.dtype) -> Array:
    """Adds arrays in float32."""
    if len(parts) == 1:
        return parts[0].astype(dtype)
    return functools.reduce(jnp.add, [x.astype(jnp.float32) for x in parts]).astype(dtype)
