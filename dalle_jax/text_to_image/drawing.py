"""Draws rows of tokens in chunks of one size.

Chunks bound the memory, compile once, and can be drawn again alone.

    C captions    n candidates per caption    B = C·n rows    N = h·w image tokens    T text positions
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from typing import Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from dalle_jax import keys
from dalle_jax.distributed.chunks import up_to_multiple
from dalle_jax.distributed.rows import over_rows
from dalle_jax.distributed.sharding import batch_shards
from dalle_jax.errors import ConfigError
from dalle_jax.priors.sampling import SamplingOptions
from dalle_jax.priors.token_prior import TokenPrior
from dalle_jax.pytree import PyTree


class Drawer(Protocol):
    """The part of `TextToImage` that drawing uses. Its attributes have the same meaning here."""

    prior: TokenPrior
    params: PyTree
    rows_at_once: int
    mesh: Mesh | None

    def encode_text(self, captions: list[str]) -> np.ndarray:
        """Encodes captions to padded ids, int32 [C, T]."""

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Decodes tokens, int32 [B, N], to images, uint8 [B, H, W, 3]."""


def check_count(n: int, seed: int) -> None:
    """Checks the number of images and the seed; raises a `ConfigError`."""
    if seed < 0 or n < 1:
        raise ConfigError(f"seed is {seed} and n is {n}; expected seed ≥ 0 and n ≥ 1.")


def chunk_shape(model: Drawer, captions: int, n: int) -> tuple[int, int]:
    """Returns (captions, candidates per caption) of a chunk: a number of rows that the devices divide."""
    shards, candidates = batch_shards(model.mesh), min(n, model.rows_at_once)
    if candidates > shards:
        candidates = up_to_multiple(candidates, shards)
    many = max(1, min(model.rows_at_once // candidates, captions))
    return up_to_multiple(many, shards // math.gcd(shards, candidates)), candidates


def chunk(
    model: Drawer,
    text: np.ndarray,
    n: int,
    seed: int,
    options: SamplingOptions,
    negative: str | None,
    first_caption: int,
    first_candidate: int,
) -> np.ndarray:
    """Draws one chunk of the n images of each caption.

    Args:
      model: draws the rows.
      text: int32 [C, T], padded captions.
      n, seed, options, negative: as in `TextToImage.generate`.
      first_caption, first_candidate: where the chunk starts.

    Returns:
      uint8 [captions, candidates, H, W, 3], see `chunk_shape`. Surplus rows repeat others.
    """
    captions, candidates = chunk_shape(model, len(text), n)
    some = np.resize(text[first_caption : first_caption + captions], (captions, text.shape[1]))
    numbers = np.tile(first_candidate + np.arange(candidates), captions)
    images = model.decode(sample(model, some, row_keys(seed, some, numbers), options, negative))
    return images.reshape(captions, candidates, *images.shape[1:])


def sample(
    model: Drawer,
    text: np.ndarray,
    keys: jax.Array,
    options: SamplingOptions,
    negative: str | None,
    known: tuple[np.ndarray, np.ndarray] | None = None,
) -> jax.Array:
    """Samples image tokens, int32 [B, N]; see `TokenPrior.sample`."""
    away = None if negative is None else model.encode_text([negative])
    draw = lambda text, keys, known: model.prior.sample(
        model.params, text, keys, known=known, negative=away, **dataclasses.asdict(options)
    )
    return over_rows(model.mesh, draw, text, keys, known)


def row_keys(seed: int, text: np.ndarray, numbers: np.ndarray, window: int = 0) -> jax.Array:
    """Returns the key of each candidate: a function of (seed, its caption, its number, the window) alone.

    The caption is part of the key, so that an unlucky draw is not shared by all captions. Otherwise metrics over many
    captions at one seed would vary as if there were only a few captions.

    Args:
      seed: the seed of the call.
      text: int32 [C, T], padded captions.
      numbers: ints [B], B a multiple of C: candidate numbers, grouped by caption.
      window: number of the window on a canvas.

    Returns:
      Keys [B].
    """
    key = keys.stream(jax.random.key(seed), "sample", window)
    captions = [zlib.crc32(np.asarray(row, np.int32).tobytes()) for row in text]
    pairs = np.repeat(np.uint32(captions), len(numbers) // len(text)), np.asarray(numbers, np.uint32)
    return jax.vmap(lambda caption, number: jax.random.fold_in(jax.random.fold_in(key, caption), number))(*pairs)


# Tokenizers with equal options are equal, so that they share one compiled program. They hold no parameters.


@functools.partial(jax.jit, static_argnums=0)
def encode(tokenizer, params, images):
    return tokenizer.encode(params, images)


@functools.partial(jax.jit, static_argnums=0)
def decode(tokenizer, params, tokens):
    return tokenizer.decode(params, tokens)
