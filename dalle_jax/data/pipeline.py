"""Batches from a source: shuffled by seed, sharded over hosts, resumable at any batch.

grain runs the workers (threads, or processes where `workers` is set) over `ExampleMaker`, for which every
batch is a pure function of its number (examples.py).  The state of an iterator is therefore that number and a
description of the run it counts in: it is the same on every host, and a run may go on with another number of
hosts or workers.

    B global batch    b rows of it on this host
"""

from __future__ import annotations

import collections
import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags, logging

from dalle_jax.data import workers as worker_processes
from dalle_jax.data.examples import ExampleMaker, Note
from dalle_jax.data.sources.open import open_source
from dalle_jax.data.sources.source import DataOptions, LeftOut, Source, UnreadableExample, decode_captions, decode_image
from dalle_jax.data.text import TextModel
from dalle_jax.errors import CheckpointError, ConfigError, DataError
from dalle_jax.token_layout import TokenLayout

_NAMED_PER_REASON = 5  # so many examples are named in the log for each reason
_LAST_BATCH = sys.maxsize // 2**20  # "endless": no position of any batch overflows 64 bits
_TRIED_AT_START = 100


class Pipeline:
    """The examples of one split as batches.

    Iterate over it for batches: in training without end, every readable example once per epoch (epochs follow
    each other inside a batch); in evaluation once, in order, the last batch padded.  Close an iterator that
    uses worker processes (`close()`, or a `with` statement).

    Attributes:
      source: the source; `source[index]` gives the example behind a row of "index".
    """

    def __init__(
        self,
        options: DataOptions,
        text_model: TextModel | None = None,
        layout: TokenLayout | None = None,
        *,
        split: str,
        train: bool,
        batch_size: int,
        seed: int = 0,
        rows: Sequence[int] | None = None,
        source: Source | None = None,
    ):
        """Opens the source and checks that something in it can be read.

        Args:
          options: what to read and how.
          text_model: encodes the captions; without one the batches have no "text" and captions are not read.
          layout: pads the text; needed with a text model.
          split: the split to read.
          train: whether to shuffle, repeat, augment and draw captions and BPE dropout.
          batch_size: B, over all hosts.
          seed: of order, augmentation, choice of caption and BPE dropout.
          rows: which rows of each batch are made here, rising: those that this host's devices hold
            (`parallel.host_rows`); None: all.
          source: an open source, used instead of opening one.

        Raises:
          ConfigError: where the numbers do not fit each other.
          DataError: where the source cannot be opened, is empty, or has nothing readable in it.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; expected 1 or more.")
        if seed < 0:
            raise ConfigError(f"seed is {seed}; expected 0 or more.")
        if text_model is not None and (layout is None or layout.text_vocab != text_model.vocab_size):
            raise ConfigError(
                f"The text model has {text_model.vocab_size} ids, the prior was built for "
                f"{layout.text_vocab if layout else 'none'}: give the text model that the prior was trained "
                "with."
            )
        self.source = open_source(options, split) if source is None else source
        self._train, self._options, self._batch_size = train, options, batch_size
        self._run = {
            "batch_size": batch_size,
            "seed": seed,
            "examples": len(self.source),
            "train": train,
        }
        self._tally = _Tally(self.source.description, self.source.left_out)
        self._check_readable(text_model is not None)
        self._make = ExampleMaker(
            self.source,
            options,
            text_model,
            layout,
            train=train,
            batch_size=batch_size,
            seed=seed,
            rows=range(batch_size) if rows is None else rows,
        )

    def __len__(self) -> int:
        """Batches in one pass over the source, the last, padded one included."""
        return -(-len(self.source) // self._batch_size)

    def __iter__(self) -> PipelineIterator:
        """A new iterator at the first batch: of numpy arrays, this host's b rows of each.

        "image" uint8 [b, S, S, 3]; "text" int32 [b, T] where there is a text model; "index" int32 [b], the
        example's place in the source; in evaluation "valid" bool [b], False where the row is padding or was
        unreadable.
        """
        last = _LAST_BATCH if self._train else len(self)
        return PipelineIterator(self._make, self._options.workers, last, self._run, self._tally)

    def skipped(self) -> dict[str, int]:
        """How many different examples have been skipped so far on this host, by reason.

        What the source says it lacks (`Source.left_out`) is counted from the start.
        """
        return self._tally.skipped()

    def truncated(self) -> int:
        """How many different examples have had a caption truncated so far on this host."""
        return self._tally.truncated()

    def metrics(self) -> dict[str, float]:
        """For the log: {"data/skipped": …, "data/skipped_<reason>": …, "data/truncated_captions": …}."""
        skipped = self.skipped()
        named = {f"data/skipped_{reason.replace(' ', '_')}": float(n) for reason, n in skipped.items()}
        totals = {
            "data/skipped": float(sum(skipped.values())),
            "data/truncated_captions": float(self.truncated()),
        }
        return totals | named

    def _check_readable(self, with_captions: bool) -> None:
        """Fails before a model is built where nothing sampled from the source is readable."""
        count = len(self.source)
        if not count:
            raise DataError(f"{self.source.description}: it holds no examples.")
        tried = np.unique(np.linspace(0, count - 1, min(count, _TRIED_AT_START), dtype=np.int64))
        error = None
        for index in tried:
            try:
                record = self.source.record(int(index))
                decode_image(record)
                if with_captions:
                    decode_captions(record)
                return
            except UnreadableExample as unreadable:
                error = unreadable
                self._tally.add((Note(error.reason, int(index), error.name, error.detail),))
        reasons = ", ".join(f"{reason}: {number}" for reason, number in self.skipped().items())
        raise DataError(
            f"{self.source.description}: nothing in it is readable ({len(tried)} of {count} examples tried; "
            f"{reasons}; for instance {error})."
        )


class PipelineIterator(Iterator[dict[str, np.ndarray]]):
    """Batches one after another, with a state that says how many have been delivered.

    `get_state` and `set_state` speak bytes (JSON), so grain's own checkpoint handler accepts it too.
    """

    def __init__(self, make: ExampleMaker, workers: int, last: int, run: Mapping[str, Any], tally: _Tally):
        """Made by `Pipeline`."""
        self._make, self._workers, self._last, self._run, self._tally = make, workers, last, dict(run), tally
        self._delivered = 0
        self._batches: grain.DatasetIterator | None = None

    def __next__(self) -> dict[str, np.ndarray]:
        if self._delivered >= self._last:
            self.close()
            raise StopIteration
        starting = self._batches is None
        with worker_processes.deaf() if starting and self._workers else contextlib.nullcontext():
            if starting:
                self._batches = iter(self._dataset(self._delivered))
            batch, notes = next(self._batches)  # the first one starts the workers
        self._delivered += 1
        self._tally.add(notes)
        if self._workers:  # in memory shared with them, which has to be given back before Python ends
            batch = {name: np.array(value) for name, value in batch.items()}
        return batch

    def _dataset(self, start: int) -> grain.IterDataset:
        batches = grain.MapDataset.range(start, self._last).map(self._make)
        if not self._workers:
            # Two batches ahead: one may wait for the disk while the other decodes (Pillow frees the
            # interpreter).
            return batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=2))
        if not flags.FLAGS.is_parsed():  # in a notebook or a test; grain reads its flags to start a process
            flags.FLAGS.mark_as_parsed()
        ahead = batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
        if self._last < _LAST_BATCH:  # grain leaves behind what a pass that ends has put into shared memory
            through_pipes = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
            ahead = grain.experimental.WithOptionsIterDataset(ahead, through_pipes)
        options = grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=2)
        return ahead.mp_prefetch(options, worker_init_fn=worker_processes.begin)

    def get_state(self) -> bytes:
        """The place after the last delivered batch, as JSON; equal on every host."""
        return json.dumps({"batches": self._delivered, **self._run}).encode()

    def set_state(self, state: bytes | str) -> None:
        """Goes to a place given by `get_state`, also one of another number of hosts or workers.

        Raises:
          CheckpointError: where the state counts other batches (another batch size, seed or data set).
        """
        try:
            values = json.loads(state)
            delivered = values.pop("batches")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"The checkpoint's place in the data cannot be read: {repr(state)[:200]}.") from error
        differing = [key for key in self._run if values.get(key) != self._run[key]]
        if differing:
            raise CheckpointError(
                "The checkpoint's place in the data does not fit this run: "
                + ", ".join(f"{key} was {values.get(key)}, is {self._run[key]}" for key in differing)
                + ". Use the settings it was saved with, or start in a new workdir."
            )
        self.close()
        self._delivered = delivered

    def start_prefetch(self) -> None:
        """Part of grain's checkpoint protocol; the workers start with the next batch."""

    def close(self) -> None:
        """Ends the workers; the next batch, if asked for, starts new ones."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def __enter__(self) -> PipelineIterator:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


class _Tally:
    """Counts different examples by reason and names the first of each in the log."""

    _TRUNCATED = "truncated caption"

    def __init__(self, description: str, left_out: tuple[LeftOut, ...]):
        self._description, self._left_out = description, left_out
        self._seen: dict[str, set[int]] = collections.defaultdict(set)
        for found in left_out:
            names = ", ".join(found.names) + (", …" if found.count > len(found.names) else "")
            logging.warning("%s: %s: %d left out when it was made: %s", description, found.reason, found.count, names)

    def add(self, notes: tuple[Note, ...]) -> None:
        for note in notes:
            seen = self._seen[note.reason]
            if note.index in seen:
                continue
            seen.add(note.index)
            if len(seen) <= _NAMED_PER_REASON:
                more = " (further ones are counted only)" if len(seen) == _NAMED_PER_REASON else ""
                logging.warning("%s: %s: %s %s%s", self._description, note.reason, note.name, note.detail, more)

    def skipped(self) -> dict[str, int]:
        counts = collections.Counter({found.reason: found.count for found in self._left_out})
        counts.update({reason: len(seen) for reason, seen in self._seen.items() if reason != self._TRUNCATED})
        return dict(sorted(counts.items()))

    def truncated(self) -> int:
        return len(self._seen.get(self._TRUNCATED, ()))
