"""Turns positions of the global example order into batches: the work of one worker for one batch.

The order is a pure function. Global position p of a run lies in epoch p // n at place p mod n. A seeded permutation
per epoch says which example that is. Batch k holds positions [k·B, (k+1)·B), and each host reads the rows that its
devices hold. Any worker of any host can therefore create any part of any batch. Resuming needs only k, and the number
of hosts or workers does not change the batches.

Unreadable examples must not shift that order, because hosts would drift apart. In training, the example half an epoch
later replaces an unreadable one (then the next, …), so hosts agree without communication. In evaluation, the row is
marked invalid.

    B global batch    b rows of it on this host    n examples
    S image size      T text positions      N image tokens
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import grain
import jax
import numpy as np
from absl import logging

from dalle_jax.data.augment import augment, fit_square
from dalle_jax.data.sources.decoding import decode_image, read_header
from dalle_jax.data.sources.source import DataOptions, Record, Source, UnreadableExample, decode_captions
from dalle_jax.data.spread import evenly
from dalle_jax.data.tally import TRUNCATED, UNKNOWN_CLASS, UNKNOWN_LETTERS, USED, Note
from dalle_jax.data.text import CaptionModel
from dalle_jax.data.token_store import TokensInMemory, TokenStore, token_dtype
from dalle_jax.errors import DataError
from dalle_jax.token_layout import PaddedIds, TokenLayout

# After this many unreadable examples in a row, reading the source fails.
_MAX_SUBSTITUTES = 1000

_HEADERS = 16  # read to estimate the memory for images that are kept at their full size

_BYTES_OF_CAPTIONS = 1024  # of one example, an estimate

# The image, or its tokens, and the record without it.
_Decoded = tuple[np.ndarray, Record]

# Decoded examples by source and image size, shared by the trainings of one process so that each decodes only once.
_CACHES: dict[tuple, dict[int, _Decoded | UnreadableExample]] = {}


def batch_shapes(
    image_size: int, captions: PaddedIds | None, batch_size: int, *, tokens: TokenLayout | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes and dtypes of a global training batch of B rows, as `ExampleMaker` creates it.

    Args:
      image_size: S.
      captions: gives T; None for batches without "text".
      batch_size: B.
      tokens: gives N if the images are encoded in advance. Batches then have "tokens" and no "image".
    """
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {"index": ((), np.int32)}
    if tokens is not None:
        shapes["tokens"] = ((tokens.image_length,), token_dtype(tokens.image_vocab))
    else:
        shapes["image"] = ((image_size, image_size, 3), np.uint8)
    if captions is not None:
        shapes["text"] = ((captions.length,), np.int32)
    return {name: jax.ShapeDtypeStruct((batch_size, *shape), dtype) for name, (shape, dtype) in shapes.items()}


class ExampleMaker:
    """Creates batch k. It is picklable, so that each worker process can hold a copy."""

    def __init__(
        self,
        source: Source,
        options: DataOptions,
        text_model: CaptionModel | None,
        captions: PaddedIds | None,
        *,
        train: bool,
        batch_size: int,
        seed: int,
        rows: Sequence[int],
        tokens: TokenStore | TokensInMemory | None = None,
    ):
        """Accepts the arguments of `Pipeline`, which validates them."""
        self._source, self._options, self._text_model, self._captions = source, options, text_model, captions
        self._tokens, self._workers = tokens, options.worker_count(images=tokens is None)
        self._train, self._seed, self._batch_size = train, seed, batch_size
        self._rows = tuple(int(row) for row in rows)
        order = grain.MapDataset.range(len(source))
        if train:
            # The seed is hashed because grain shuffles epoch e with seed + e: the second epoch of seed 0 would
            # be the first epoch of seed 1.
            order = order.shuffle(seed=int(self._entropy(0, 0, "shuffle").generate_state(1)[0]))
        self._order = order
        self._cache = self._shared_cache() if options.cache and self._fits_in_memory() else None

    def _fits_in_memory(self) -> bool:
        """Returns whether the prepared images of the whole source fit into `data.cache_bytes`.

        A part would help little, because each epoch reads all images.
        """
        options, count = self._options, len(self._source)
        if self._tokens is not None:
            each = self._tokens.shape[1] * self._tokens.dtype.itemsize + _BYTES_OF_CAPTIONS
        else:
            each = 3 * options.image_size**2 if self._resizes_at_once else self._bytes_of_decoded()
        needed = count * each * max(1, self._workers)
        if needed > options.cache_bytes and self._train:
            logging.log_first_n(
                logging.INFO,
                "%s: its examples need about %s bytes of memory, so each epoch decodes them again. If there is memory "
                "for them, give --config.data.cache_bytes=%d.",
                1, self._source.description, f"{needed:,}", needed,
            )  # fmt: skip
        return needed <= options.cache_bytes

    def _bytes_of_decoded(self) -> int:
        """Returns the mean size of decoded images of the source, estimated from the headers of a few."""
        sizes = []
        for index in evenly(len(self._source), _HEADERS):
            try:
                header = read_header(self._source.record(int(index)), self._options.limits)
            except UnreadableExample:
                continue
            if header is not None:
                sizes.append(3 * math.prod(header.size))
        return round(sum(sizes) / max(len(sizes), 1))

    def _shared_cache(self) -> dict[int, _Decoded | UnreadableExample]:
        """Returns the cache of this source and image size, or a new cache if the source may change."""
        options = self._options
        if self._source.identity is None or self._tokens is not None:
            return {}
        kept = (options.image_key, options.caption_key, options.limits, options.fit, self._resizes_at_once)
        return _CACHES.setdefault((self._source.identity, *kept), {})

    @property
    def _resizes_at_once(self) -> bool:
        """Whether every image is used whole and at one size."""
        return not self._train or self._options.augment == "none"

    def __getstate__(self):  # The cached examples are not pickled: each worker process fills its own cache.
        return {**self.__dict__, "_cache": None if self._cache is None else {}}

    def __call__(self, step: int) -> tuple[dict[str, np.ndarray], tuple[Note, ...]]:
        """Creates this host's rows of batch `step`.

        Args:
          step: k.

        Returns:
          batch: "image" uint8 [b, S, S, 3], or "tokens" [b, N] if the images are encoded in advance; "index" int32
            [b] (the example's place in the source); with a text model "text" int32 [b, T]; in evaluation "valid"
            bool [b].
          notes: skipped examples and truncated captions, to be counted.

        Raises:
          DataError: in training, if no readable example is found.
        """
        size, notes = self._options.image_size, []
        count = len(self._rows)
        if self._tokens is None:
            images = np.zeros((count, size, size, 3), np.uint8)
        else:
            images = np.zeros((count, self._tokens.shape[1]), self._tokens.dtype)
        texts = None
        if self._text_model is not None:
            texts = np.tile(self._captions.empty(), (count, 1))
        indices = np.zeros(count, np.int32)
        valid = np.zeros(count, np.bool_)
        for row, position in enumerate(step * self._batch_size + row for row in self._rows):
            if not self._train and position >= len(self._source):
                break
            made = self._make(position, notes)
            if made is not None:
                index, images[row], text = made
                indices[row], valid[row] = index, True
                if texts is not None:
                    texts[row] = text
        batch = {"image" if self._tokens is None else "tokens": images, "index": indices}
        if texts is not None:
            batch["text"] = texts
        if not self._train:
            batch["valid"] = valid
        return batch, tuple(notes)

    def _make(self, position: int, notes: list[Note]) -> tuple[int, np.ndarray, np.ndarray | None] | None:
        """Returns (index, image or tokens, text) at a position, or a substitute; None in evaluation if unreadable."""
        count = len(self._source)
        epoch, place = divmod(position, count)
        for attempt in range(min(count, _MAX_SUBSTITUTES) + 1 if self._train else 1):
            if attempt:
                place = (position + count // 2 + attempt - 1) % count
                if place == position % count:  # the search has come back to the unreadable example
                    continue
            index = int(self._order[epoch * count + place]) if self._train else place
            try:
                return (index, *self._example(index, epoch, notes))
            except UnreadableExample as error:
                notes.append(Note(error.reason, index, error.name, error.detail))
        if not self._train:
            return None
        failed = [note for note in notes if note.reason not in USED]
        reasons = sorted({note.reason for note in failed})
        last, tried = failed[-1], len(set(failed))
        raise DataError(
            f"{self._source.description}: no readable example found ({tried} examples tried, {count} in all: "
            f"{', '.join(reasons)}). The last one is {last.name}: {last.reason} {last.detail}".rstrip()
        )

    def _example(self, index: int, epoch: int, notes: list[Note]) -> tuple[np.ndarray, np.ndarray | None]:
        image, record = self._decoded(index)
        options = self._options
        if self._tokens is not None:
            pass  # the image is used as it was encoded
        elif self._train and options.augment != "none":
            generator = np.random.default_rng(self._entropy(epoch, index, "augment"))
            image = augment(image, options.image_size, options.augment, generator)
        elif image.shape[:2] != (options.image_size, options.image_size):
            image = augment(image, options.image_size, "none", None)
        if self._text_model is None:
            return image, None
        captions = decode_captions(record)
        chosen, seed, dropout = 0, None, options.bpe_dropout if self._train else 0.0
        if self._train and (dropout or len(captions) > 1):
            words = self._entropy(epoch, index, "text").generate_state(2, np.uint64)
            chosen, seed = int(words[0]), int(words[1])
        length = self._captions.length
        caption = captions[chosen % len(captions)]
        try:
            ids, truncated = self._text_model.encode(caption, max_length=length, dropout=dropout, seed=seed)
        except DataError as error:  # of labels
            raise UnreadableExample(UNKNOWN_CLASS, record.name, f"({caption})") from error
        if unknown := self._text_model.unknown_letters(caption):
            notes.append(Note(UNKNOWN_LETTERS, index, record.name, f"({unknown})"))
        if truncated:
            notes.append(Note(TRUNCATED, index, record.name, f"(text.length is {length})"))
        return image, self._captions.pad(ids)

    def _decoded(self, index: int) -> _Decoded:
        """Returns one example, from the cache if there is one, with the image at the size at which it is used."""
        if self._cache is None:
            return self._decode(index)
        if index not in self._cache:
            try:
                self._cache[index] = self._decode(index)
            except UnreadableExample as error:
                self._cache[index] = error.with_traceback(None)
        found = self._cache[index]
        if isinstance(found, UnreadableExample):
            # A new exception each time, because one that is raised again collects the frames of every raise.
            raise UnreadableExample(found.reason, found.name, found.detail)
        return found

    def _decode(self, index: int) -> _Decoded:
        if self._tokens is not None:
            return self._tokens.row(index), self._source.without_image(index)
        record = self._source.record(index)
        image = fit_square(decode_image(record, self._options.limits), self._options.fit)
        if self._resizes_at_once:
            image = augment(image, self._options.image_size, "none", None)
        return image, dataclasses.replace(record, image=b"")

    def _entropy(self, epoch: int, index: int, stream: str) -> np.random.SeedSequence:
        """Returns the seed of one example in one epoch for one use."""
        return np.random.SeedSequence([self._seed, epoch, index, *stream.encode()])
