"""Draws rows of tokens in chunks of few sizes.

Chunks bound the memory and can be drawn again alone. Each new size would compile a program, which takes seconds. The
rows of a chunk are therefore filled up to 8, 16, 32, … with copies that nobody sees.

    C captions    n candidates per caption    B rows of a chunk    N = h·w image tokens    T text positions
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh

from dalle_jax import keys
from dalle_jax.configuration.values import check_seed, natural
from dalle_jax.distributed.chunks import up_to_multiple
from dalle_jax.distributed.rows import over_rows
from dalle_jax.distributed.sharding import batch_shards, on_mesh
from dalle_jax.image_tokenizers.tokenizer import ImageTokenizer
from dalle_jax.priors.sampling import SamplingOptions
from dalle_jax.priors.token_prior import TokenPrior
from dalle_jax.pytree import PyTree

MOST_IMAGES = 2**20  # of a caption, or at once
GREY = 190  # of cells that are not drawn yet
_FEW = 8  # rows of the smallest program
_CHEAP = 1e9  # parameters x image tokens; a row of such a model takes about 0.2 s on two CPU cores
_SECONDS = 2.0, 0.35  # of a compilation and for each layer, on two CPU cores; 5 layers were measured at 3.8 s


class Drawer(Protocol):
    """The part of `TextToImage` that drawing uses. Its attributes have the same meaning here."""

    prior: TokenPrior
    params: PyTree
    tokenizer: ImageTokenizer
    tokenizer_params: PyTree
    rows_at_once: int
    mesh: Mesh | None
    on_frame: Callable[[Frame], None] | None

    def encode_text(self, captions: list[str]) -> np.ndarray:
        """Encodes captions to conditions, such as padded ids, int32 [C, T]."""


@dataclasses.dataclass(frozen=True)
class Frame:
    """Images while they are drawn.

    Attributes:
      caption, candidate: index of the first caption, and number of the first image of each.
      progress: share of the decoding steps that are done, in (0, 1].
      images: computes the images, uint8 [captions, images, H, W, 3]. Cells that are not drawn yet are grey. The devices
        decode them only if it is called, and only until the next frame.
    """

    caption: int
    candidate: int
    progress: float
    images: Callable[[], np.ndarray]

    def changed(self, change: Callable[[np.ndarray], np.ndarray]) -> Frame:
        """Returns the frame with `change` applied to its images."""
        return dataclasses.replace(self, images=lambda: change(self.images()))


def check_count(n: int, seed: int) -> tuple[int, int]:
    """Checks the number of images and the seed; raises a `ConfigError`."""
    return natural("n", n, 1, MOST_IMAGES), check_seed(seed)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Images that are drawn together: some candidates of some captions that follow each other.

    Attributes:
      caption, candidate: index of the first caption, and number of the first candidate of each.
      captions, candidates: number of captions, and of candidates of each.
      shape: (texts, rows per text) of the compiled program. It has at least one row for each image.
    """

    caption: int
    candidate: int
    captions: int
    candidates: int
    shape: tuple[int, int]

    def holds(self, caption: int, candidate: int) -> bool:
        """Returns whether an image is one of the chunk."""
        inside = 0 <= caption - self.caption < self.captions
        return inside and 0 <= candidate - self.candidate < self.candidates

    def place(self) -> tuple[slice, slice]:
        """Returns the place of the chunk in an array [C, n, ...]."""
        return (
            slice(self.caption, self.caption + self.captions),
            slice(self.candidate, self.candidate + self.candidates),
        )

    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the rows of the program. Surplus rows repeat others.

        Returns:
          The caption's index of each text, int [texts], and the candidate's number of each row, int [B].
        """
        texts, each = self.shape
        if each == 1:
            image = np.minimum(np.arange(texts), self.captions * self.candidates - 1)
            return self.caption + image // self.candidates, self.candidate + image % self.candidates
        text = np.minimum(np.arange(texts), self.captions - 1)
        number = np.minimum(np.arange(each), self.candidates - 1)
        return self.caption + text, self.candidate + np.tile(number, texts)

    def images(self, rows: np.ndarray) -> np.ndarray:
        """Returns the rows without the surplus ones: [B, ...] to [captions, candidates, ...]."""
        texts, each = self.shape
        if each == 1:
            rows = rows[: self.captions * self.candidates]
            return rows.reshape(self.captions, self.candidates, *rows.shape[1:])
        return rows.reshape(texts, each, *rows.shape[1:])[: self.captions, : self.candidates]


def chunks(model: Drawer, captions: int, n: int) -> Iterator[Chunk]:
    """Splits n images of each caption into chunks of at most `rows_at_once` images and of few shapes.

    A few images have one text per row, so that one program draws them whatever their captions are. Many candidates of a
    caption share its text, which costs less memory and time.

    Args:
      model: draws the rows.
      captions: C, number of captions.
      n: images per caption.

    Yields:
      The chunks. All images of a caption come before those of the next one.
    """
    alone = max(_least_rows(model), batch_shards(model.mesh))
    width = min(n, model.rows_at_once)
    many = max(1, model.rows_at_once // (width if width <= alone else row_count(model, width)))
    for caption in range(0, captions, many):
        some = min(many, captions - caption)
        for candidate in range(0, n, width):
            count = min(width, n - candidate)
            if count > alone:
                shape = min(many, _power_of_two(some)), row_count(model, count)
            else:
                shape = row_count(model, some * count), 1
            yield Chunk(caption, candidate, some, count, shape)


def row_count(model: Drawer, count: int) -> int:
    """Returns the number of rows of the program for `count` of them, at most `rows_at_once`. The devices divide it."""
    padded = max(_least_rows(model), _power_of_two(count))
    return up_to_multiple(min(padded, model.rows_at_once), batch_shards(model.mesh))


def _least_rows(model: Drawer) -> int:
    """Returns the fewest rows of a program: 8 if a row costs less than the compilation of another program, else 1."""
    size = sum(leaf.size for leaf in jax.tree.leaves(model.params)) * model.prior.layout.image_length
    return min(_FEW, model.rows_at_once) if size <= _CHEAP else 1


def _power_of_two(count: int) -> int:
    """Rounds up to a power of two."""
    return 1 << (count - 1).bit_length()


def by_rows(model: Drawer, function: Callable[[np.ndarray], jax.Array], rows: np.ndarray) -> np.ndarray:
    """Applies a compiled function to any number of rows, in chunks of few sizes.

    Args:
      model: gives the sizes and the mesh.
      function: maps [b, ...] to [b, ...], each row alone.
      rows: [B, ...] with B at least 1.

    Returns:
      [B, ...].
    """
    parts = []
    for start in range(0, len(rows), model.rows_at_once):
        part = rows[start : start + model.rows_at_once]
        places = np.minimum(np.arange(row_count(model, len(part))), len(part) - 1)
        parts.append(np.asarray(over_rows(model.mesh, function, part[places]))[: len(part)])
    return np.concatenate(parts)


def draw(
    model: Drawer, text: np.ndarray, part: Chunk, seed: int, options: SamplingOptions, negative: str | None
) -> np.ndarray:
    """Draws one chunk.

    Conditions go to the devices and pixels come back. The tokens between them stay on the devices.

    Args:
      model: draws the rows.
      text: conditions of all captions, [C, ...].
      part: one of `chunks`.
      seed, options, negative: as in `TextToImage.generate`.

    Returns:
      uint8 [captions, candidates, H, W, 3].
    """
    captions, numbers = part.rows()
    text = text[captions]
    tokens = sample(model, text, row_keys(seed, text, numbers), options, negative, part=part)
    grid = tokens.reshape(-1, model.prior.layout.height, model.prior.layout.width)
    function = functools.partial(decode, model.tokenizer, model.tokenizer_params)
    return part.images(np.asarray(over_rows(model.mesh, function, grid)))


def sample(
    model: Drawer,
    text: np.ndarray,
    keys: jax.Array,
    options: SamplingOptions,
    negative: str | None,
    known: tuple[np.ndarray, np.ndarray] | None = None,
    part: Chunk | None = None,
) -> jax.Array:
    """Samples image tokens, int32 [B, N]; see `TokenPrior.sample` and `TokenPrior.check_sampling`.

    If the model has `on_frame` and `part` is given, `on_frame` is called for each frame of the chunk.
    """
    model.prior.check_sampling(options)
    if options.guidance and not model.prior.options.caption_drop:
        _warn_of_guidance(model.prior)
    away = None if negative is None else model.encode_text([negative])
    traced = ("final_temperature", "top_k", "top_p")
    static = [getattr(options, name) for name in ("steps", "order", "choice_temperature", "guidance_schedule")]
    present = [getattr(options, name) is not None for name in traced] + [bool(options.guidance), known is not None]
    watched = model.on_frame is not None and part is not None
    _announce(model.prior, model.mesh, len(text), len(keys), *static, *present, watched)
    function = model.prior.watch if watched else model.prior.sample
    draw = lambda text, keys, known: function(
        model.params, text, keys, known=known, negative=away, **dataclasses.asdict(options)
    )
    drawn = over_rows(model.mesh, draw, text, keys, known)
    return _last(model, drawn, part) if watched else drawn


def _last(model: Drawer, drawn: Iterator[tuple[jax.Array, float]], part: Chunk) -> jax.Array:
    """Calls `on_frame` with each frame of a chunk, and returns the last tokens, int32 [B, N].

    Args:
      model: draws the rows.
      drawn: the result of `TokenPrior.watch`.
      part: the chunk.
    """
    shape = model.prior.layout.height, model.prior.layout.width
    while True:
        with nullcontext() if model.mesh is None else on_mesh(model.mesh):
            tokens, progress = next(drawn)
        images = functools.partial(_partial_images, model, part, tokens.reshape(-1, *shape))
        model.on_frame(Frame(part.caption, part.candidate, progress, images))
        if progress == 1:
            return tokens


def _partial_images(model: Drawer, part: Chunk, grids: jax.Array) -> np.ndarray:
    """Decodes the token grids of a chunk, int32 [B, h, w]: uint8 [captions, candidates, H, W, 3]."""
    function = functools.partial(decode_partly, model.tokenizer, model.prior.layout.mask_id, model.tokenizer_params)
    return part.images(np.asarray(over_rows(model.mesh, function, grids)))


@functools.lru_cache(maxsize=1000)
def _warn_of_guidance(prior: TokenPrior) -> None:
    """Logs, once for each prior, that guidance needs a training that it did not have."""
    del prior
    logging.warning(
        "Guidance leads away from the empty caption, which this prior has never seen (model.caption_drop=0). Images "
        "may get worse. Set guidance to 0, or train with --config.model.caption_drop=0.1."
    )


@functools.lru_cache(maxsize=1000)
def warn_of_no_caption(prior: TokenPrior) -> None:
    """Logs, once for each prior, that drawing without a caption needs a training that it did not have."""
    if not prior.options.caption_drop:
        logging.warning(
            "No caption stands for the empty caption, which this prior has never seen (model.caption_drop=0). Give a "
            "caption, or train with --config.model.caption_drop=0.1."
        )


@functools.lru_cache(maxsize=1000)
def _announce(prior: TokenPrior, mesh: Mesh | None, texts: int, rows: int, *variant) -> None:
    """Logs, once for each program, that the first call waits for the compiler."""
    seconds = _SECONDS[0] + _SECONDS[1] * prior.options.trunk.depth
    # A warning, because Python programs do not show less.
    logging.warning(
        "Compiling once for up to %d images at a time: about %.0f s on two CPU cores, less from the compilation cache.",
        rows, seconds,
    )  # fmt: skip


def row_keys(seed: int, text: np.ndarray, numbers: np.ndarray, window: int = 0) -> jax.Array:
    """Returns the key of each candidate: a function of (seed, its caption, its number, the window) alone.

    The caption is part of the key, so that an unlucky draw is not shared by all captions. Otherwise metrics over many
    captions at one seed would vary as if there were only a few captions.

    Args:
      seed: the seed of the call.
      text: conditions, [C, ...], such as padded captions.
      numbers: ints [B], B a multiple of C: candidate numbers, grouped by caption.
      window: number of the window on a canvas.

    Returns:
      Keys [B].
    """
    key = keys.stream(jax.random.key(seed), "sample", window)
    captions = [zlib.crc32(np.ascontiguousarray(row).tobytes()) for row in text]
    return _fold_in(key, np.repeat(np.uint32(captions), len(numbers) // len(text)), np.asarray(numbers, np.uint32))


@jax.jit
def _fold_in(key: jax.Array, captions: jax.Array, numbers: jax.Array) -> jax.Array:
    fold = lambda caption, number: jax.random.fold_in(jax.random.fold_in(key, caption), number)
    return jax.vmap(fold)(captions, numbers)


# Tokenizers with equal options are equal, so that they share one compiled program. They hold no parameters.


@functools.partial(jax.jit, static_argnums=0)
def encode(tokenizer, params, images):
    return tokenizer.encode(params, images)


@functools.partial(jax.jit, static_argnums=0)
def decode(tokenizer, params, tokens):
    # As `to_uint8`, but on the devices, so that a fourth of the bytes is copied.
    return jnp.round(jnp.clip(tokenizer.decode(params, tokens), 0, 1) * 255).astype(jnp.uint8)


@functools.partial(jax.jit, static_argnums=(0, 1))
def decode_partly(tokenizer, mask_id, params, tokens):
    """Decodes token grids, int32 [B, h, w], as `decode` does; cells with `mask_id` are grey."""
    masked = tokens == mask_id
    images = decode(tokenizer, params, jnp.where(masked, 0, tokens))
    f = images.shape[1] // tokens.shape[1]
    return jnp.where(jnp.repeat(jnp.repeat(masked, f, axis=1), f, axis=2)[..., None], jnp.uint8(GREY), images)
