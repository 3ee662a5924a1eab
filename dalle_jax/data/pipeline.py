"""Batches from a source: shuffled by seed, sharded over hosts, resumable at any batch.

Every batch is a pure function of its number (examples.py). The iterator over them is in pipeline_iterator.py.

    B global batch    b rows of it on this host    S image size    T text positions
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence

import numpy as np

from dalle_jax.data.examples import ExampleMaker
from dalle_jax.data.pipeline_iterator import LAST_BATCH, Chosen, Make, PipelineIterator
from dalle_jax.data.sources.decoding import decode_image
from dalle_jax.data.sources.open import open_source
from dalle_jax.data.sources.source import DataOptions, Source, UnreadableExample, decode_captions
from dalle_jax.data.spread import Selected, evenly
from dalle_jax.data.tally import Note, Tally
from dalle_jax.data.text import CaptionModel
from dalle_jax.data.token_store import TokensInMemory, TokenStore
from dalle_jax.errors import ConfigError, DataError
from dalle_jax.token_layout import PaddedIds

_TRIED_AT_START = 100
_SPREAD = 64  # examples of `spread_batch`


class Pipeline:
    """The examples of one split as batches.

    Iterating over it gives batches. In training they never end: each epoch holds every readable example once, and
    epochs follow each other inside a batch. In evaluation there is one pass in order, and the last batch is padded.
    Close an iterator that uses worker processes (`close()`, or a `with` statement).

    Attributes:
      source: the source; `source[index]` gives the example behind a row of "index".
    """

    def __init__(
        self,
        options: DataOptions,
        text_model: CaptionModel | None = None,
        captions: PaddedIds | None = None,
        *,
        split: str,
        train: bool,
        batch_size: int,
        seed: int = 0,
        rows: Sequence[int] | None = None,
        source: Source | None = None,
        held_out: Source | None = None,
        tokens: TokenStore | TokensInMemory | None = None,
    ):
        """Opens the source and checks that it holds a readable example.

        Args:
          options: what to read and how.
          text_model: encodes the captions; without one the batches have no "text" and captions are not read.
          captions: pads the text; required with a text model.
          split: the split to read.
          train: whether to shuffle, repeat, augment and draw captions and BPE dropout.
          batch_size: B, over all hosts.
          seed: seed of order, augmentation, choice of caption and BPE dropout.
          rows: ascending numbers of the rows of each batch to create here, those that this host's devices hold
            (`distributed.rows.host_rows`); None for all rows.
          source: an open source to use instead of opening one.
          held_out: the evaluation split of a training. The state of an iterator describes it, so that a resumed
            training reports changes.
          tokens: image tokens of the split in the order of its source. The batches then hold them and no images.

        Raises:
          ConfigError: if the arguments do not fit each other.
          DataError: if the source cannot be opened, is empty or has no readable example.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; expected 1 or more.")
        if seed < 0:
            raise ConfigError(f"seed is {seed}; expected 0 or more.")
        if text_model is not None and (captions is None or captions.vocab != text_model.vocab_size):
            raise ConfigError(
                f"The text model has {text_model.vocab_size} ids, but the prior was built for "
                f"{captions.vocab if captions else 'none'}: give the text model that the prior was trained with."
            )
        self.source = open_source(options, split) if source is None else source
        if tokens is not None and len(tokens) != len(self.source):
            raise DataError(f"{self.source.description}: {len(self.source)} examples, and tokens of {len(tokens)}.")
        self._train, self._options, self._batch_size, self._tokens = train, options, batch_size, tokens
        self._run = {
            "batch_size": batch_size,
            "seed": seed,
            "examples": len(self.source),
            "train": train,
            **_identity("data", self.source),
            **({} if held_out is None else {"held_out": len(held_out), **_identity("held_out_data", held_out)}),
        }
        rows = range(batch_size) if rows is None else rows
        self._tally = Tally(
            self.source.description,
            self.source.left_out,
            text_length=None if text_model is None else captions.length,
            epoch=len(self.source) * len(rows) // batch_size,
        )
        self._check_readable(text_model is not None)
        self._maker = functools.partial(
            ExampleMaker,
            options=options,
            text_model=text_model,
            captions=captions,
            train=train,
            batch_size=batch_size,
            seed=seed,
            rows=rows,
        )
        self._make = self._maker(self.source, tokens=tokens)

    def __len__(self) -> int:
        """Returns the number of batches in one pass over the source, including the padded last one."""
        return -(-len(self.source) // self._batch_size)

    def __iter__(self) -> PipelineIterator:
        """Returns a new iterator at the first batch; see `batches`."""
        return self.batches()

    def batches(self, start: int = 0) -> PipelineIterator:
        """Returns a new iterator.

        Args:
          start: number of batches to leave out at the beginning.

        Returns:
          An iterator over this host's rows of each batch, as numpy arrays: "image" uint8 [b, S, S, 3], or "tokens"
          [b, N] if they are given; "index" int32 [b] (the example's place in the source); with a text model "text"
          int32 [b, T]; in evaluation "valid" bool [b], False for padding and unreadable examples.
        """
        last = LAST_BATCH if self._train else len(self)
        return self._iterator(self._make, last, start)

    def chosen_batches(self, numbers: Sequence[int]) -> PipelineIterator:
        """Returns an iterator over the batches with these numbers only; see `batches`."""
        return self._iterator(Chosen(self._make, np.asarray(numbers, np.int64)), len(numbers))

    def _iterator(self, make: Make, last: int, start: int = 0) -> PipelineIterator:
        workers = self._options.worker_count(images=self._tokens is None)
        workers = min(workers, max(last - start, 1))  # no process without a batch
        return PipelineIterator(make, workers, last, self._run, self._tally, self.source.description, start)

    def spread_batch(self) -> dict[str, np.ndarray]:
        """Creates one evaluation batch of up to 64 examples that are spread evenly over the source.

        It is created in this process, without workers, and is always the same.

        Returns:
          This host's rows, as from iterating in evaluation. Rows without an example are not valid.
        """
        places = evenly(len(self.source), min(self._batch_size, _SPREAD))
        batch, notes = self._maker(Selected(self.source, places), train=False)(0)
        self._tally.add([dataclasses.replace(note, index=int(places[note.index])) for note in notes], rows=0)
        batch["index"] = places[batch["index"]].astype(np.int32)
        return batch

    def skipped(self) -> dict[str, int]:
        """Returns the number of different examples skipped so far on this host, by reason.

        Examples that the source lacks (`Source.left_out`) are included from the start.
        """
        return self._tally.skipped()

    def counts(self) -> dict[str, int]:
        """Returns this host's counts of skipped examples and truncated captions for the training log.

        Returns:
          {"left_out/<reason>": …}; with a text model also "captions_truncated" and, if there are any,
          "captions_with_unknown_letters". Each counts different examples.
        """
        return self._tally.counts()

    def _check_readable(self, with_captions: bool) -> None:
        """Raises an error before a model is built if no example of a sample can be read."""
        count = len(self.source)
        if not count:
            raise DataError(f"{self.source.description}: it holds no examples.")
        if with_captions and self.source.captions_missing:
            raise DataError(self.source.captions_missing)
        tried = np.unique(np.linspace(0, count - 1, min(count, _TRIED_AT_START), dtype=np.int64))
        error = None
        for index in tried:
            try:
                if self._tokens is None:
                    record = self.source.record(int(index))
                    decode_image(record, self._options.limits)
                else:
                    self._tokens.row(int(index))
                    record = self.source.without_image(int(index))
                if with_captions:
                    decode_captions(record)
                return
            except UnreadableExample as unreadable:
                error = unreadable
                self._tally.add((Note(error.reason, int(index), error.name, error.detail),), rows=0)
        reasons = ", ".join(f"{reason}: {number}" for reason, number in self.skipped().items())
        raise DataError(
            f"{self.source.description}: no readable example found ({len(tried)} of {count} examples tried; "
            f"{reasons}). The last one is {error}."
        )


def _identity(name: str, source: Source) -> dict[str, str]:
    """Returns {name: a short hash of the source's identity}; {} if it has none."""
    return {} if source.identity is None else {name: hashlib.sha256(source.identity.encode()).hexdigest()[:16]}
