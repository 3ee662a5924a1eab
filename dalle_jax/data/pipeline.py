"""Batches from a source: shuffled by seed, sharded over hosts, resumable at any batch.

grain runs `ExampleMaker` in threads, or in processes if `workers` is set. Every batch is a pure function of its number
(examples.py). The state of an iterator is therefore that number and a description of the run that counts it. It is
equal on every host, and a run may resume with another number of hosts or workers.

    B global batch    b rows of it on this host    S image size    T text positions
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags, logging

from dalle_jax.data import workers as worker_processes
from dalle_jax.data.examples import ExampleMaker
from dalle_jax.data.sources.decoding import decode_image
from dalle_jax.data.sources.open import open_source
from dalle_jax.data.sources.source import DataOptions, Source, UnreadableExample, decode_captions
from dalle_jax.data.spread import Selected, evenly
from dalle_jax.data.tally import Note, Tally
from dalle_jax.data.text import TextModel
from dalle_jax.errors import CheckpointError, ConfigError, DataChanged, DataError
from dalle_jax.storage import json_files
from dalle_jax.token_layout import TokenLayout

_LAST_BATCH = sys.maxsize // 2**20  # "endless": the positions of every batch fit in 64 bits
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
        text_model: TextModel | None = None,
        layout: TokenLayout | None = None,
        *,
        split: str,
        train: bool,
        batch_size: int,
        seed: int = 0,
        rows: Sequence[int] | None = None,
        source: Source | None = None,
        held_out: Source | None = None,
    ):
        """Opens the source and checks that it holds a readable example.

        Args:
          options: what to read and how.
          text_model: encodes the captions; without one the batches have no "text" and captions are not read.
          layout: pads the text; required with a text model.
          split: the split to read.
          train: whether to shuffle, repeat, augment and draw captions and BPE dropout.
          batch_size: B, over all hosts.
          seed: seed of order, augmentation, choice of caption and BPE dropout.
          rows: ascending numbers of the rows of each batch to create here, those that this host's devices hold
            (`distributed.rows.host_rows`); None for all rows.
          source: an open source to use instead of opening one.
          held_out: the evaluation split of a training. The state of an iterator describes it, so that a resumed
            training reports changes.

        Raises:
          ConfigError: if the arguments do not fit each other.
          DataError: if the source cannot be opened, is empty or has no readable example.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; expected 1 or more.")
        if seed < 0:
            raise ConfigError(f"seed is {seed}; expected 0 or more.")
        if text_model is not None and (layout is None or layout.text_vocab != text_model.vocab_size):
            raise ConfigError(
                f"The text model has {text_model.vocab_size} ids, but the prior was built for "
                f"{layout.text_vocab if layout else 'none'}: give the text model that the prior was trained with."
            )
        self.source = open_source(options, split) if source is None else source
        self._train, self._options, self._batch_size = train, options, batch_size
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
            text_length=None if text_model is None else layout.text_length,
            epoch=len(self.source) * len(rows) // batch_size,
        )
        self._check_readable(text_model is not None)
        self._maker = functools.partial(
            ExampleMaker,
            options=options,
            text_model=text_model,
            layout=layout,
            train=train,
            batch_size=batch_size,
            seed=seed,
            rows=rows,
        )
        self._make = self._maker(self.source)

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
          An iterator over this host's rows of each batch, as numpy arrays: "image" uint8 [b, S, S, 3] and "index"
          int32 [b] (the example's place in the source); with a text model "text" int32 [b, T]; in evaluation "valid"
          bool [b], False for padding and unreadable examples.
        """
        last = _LAST_BATCH if self._train else len(self)
        return PipelineIterator(
            self._make, self._options.workers, last, self._run, self._tally, self.source.description, start
        )

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
                record = self.source.record(int(index))
                decode_image(record, self._options.limits)
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


class PipelineIterator(Iterator[dict[str, np.ndarray]]):
    """An iterator over batches whose state is the number of delivered batches.

    `get_state` and `set_state` use bytes (JSON), so that grain's checkpoint handler accepts it too.
    """

    def __init__(
        self,
        make: ExampleMaker,
        workers: int,
        last: int,
        run: Mapping[str, Any],
        tally: Tally,
        name: str = "the data",
        start: int = 0,
    ):
        """Called by `Pipeline` only.

        Args:
          make: creates a batch from its number.
          workers: number of worker processes; 0 for threads.
          last: number of batches before the iterator ends.
          run: the description of the run that `set_state` compares.
          tally: counts what the batches' notes report.
          name: the source, for messages.
          start: number of batches to leave out at the beginning.
        """
        self._name = name
        self._make, self._workers, self._last, self._run, self._tally = make, workers, last, dict(run), tally
        self._delivered = start
        self._batches: grain.DatasetIterator | None = None

    def __next__(self) -> dict[str, np.ndarray]:
        if self._delivered >= self._last:
            self.close()
            raise StopIteration
        starting = self._batches is None
        with worker_processes.signals_blocked() if starting and self._workers else contextlib.nullcontext():
            if starting:
                self._batches = iter(self._dataset(self._delivered))
            batch, notes = next(self._batches)  # the first one starts the workers
        self._delivered += 1
        self._tally.add(notes, rows=int(batch["valid"].sum()) if "valid" in batch else len(batch["index"]))
        if self._workers:  # The arrays lie in shared memory, which must be released before Python ends.
            batch = {name: np.array(value) for name, value in batch.items()}
        return batch

    def _dataset(self, start: int) -> grain.IterDataset:
        batches = grain.MapDataset.range(start, self._last).map(self._make)
        if not self._workers:
            # Two batches ahead: one may wait for the disk while the other decodes, because Pillow releases the
            # interpreter lock.
            return batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=2))
        if not flags.FLAGS.is_parsed():  # in a notebook or a test; grain reads its flags to start a process
            flags.FLAGS.mark_as_parsed()
        ahead = batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
        if self._last < _LAST_BATCH:  # Shared memory of a pass that ends is never released by grain: use pipes.
            through_pipes = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
            ahead = grain.experimental.WithOptionsIterDataset(ahead, through_pipes)
        options = grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=2)
        return ahead.mp_prefetch(options, worker_init_fn=worker_processes.init_worker)

    def get_state(self) -> bytes:
        """Returns the place after the last delivered batch as JSON; equal on every host."""
        return json.dumps({"batches": self._delivered, **self._run}).encode()

    def set_state(self, state: bytes | str) -> None:
        """Moves to a place given by `get_state`, also of a run with another number of hosts or workers.

        Args:
          state: the JSON of `get_state`.

        Raises:
          DataChanged: if the number of training examples changed.
          CheckpointError: if the state counts other batches (another batch size or seed), or cannot be read.
        """
        try:
            values = json_files.parse(state)
            delivered = values.pop("batches")
            if not isinstance(delivered, int) or delivered < 0:
                raise ValueError(f"batches is {delivered!r}")
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"The checkpoint's place in the data cannot be read: {repr(state)[:200]}.") from error
        self._compare(values)
        self.close()
        self._delivered = delivered

    def _compare(self, stored: Mapping[str, Any]) -> None:
        """Compares the description of the run in a state with this run's. See `set_state` for the errors.

        A change that leaves the order of the examples as it is gives a warning, and the training resumes. A state of an
        earlier version may lack keys.
        """
        now = self._run
        for key in ("batch_size", "seed"):
            if stored.get(key) != now[key]:
                raise CheckpointError(
                    f"The checkpoint's place in the data counts batches of {key}={stored.get(key)}, but {key} is "
                    f"{now[key]}. Give --config.{key}={stored.get(key)}, or start in another --workdir."
                )
        if stored.get("train") != now["train"]:
            raise CheckpointError("The checkpoint's place in the data is not that of a training.")
        if stored.get("examples") != now["examples"]:
            raise DataChanged(
                f"{self._name}: the training had {stored.get('examples')} examples when the checkpoint was written, "
                f"and has {now['examples']} now."
            )
        changed = {key for key in now if key in stored and stored[key] != now[key]}
        if "data" in changed:
            logging.warning(
                "%s: the files are not those of the checkpoint (edited, copied or moved). Their number is still %d, so "
                "the training resumes with them.",
                self._name, now["examples"],
            )  # fmt: skip
        if "held_out" in changed:
            logging.warning(
                "%s: %d examples were held out when the checkpoint was written, and %d are now. Validation metrics "
                "before and after are not comparable.",
                self._name, stored["held_out"], now["held_out"],
            )  # fmt: skip
        elif "held_out_data" in changed:
            logging.warning(
                "%s: the held-out files are not those of the checkpoint (edited, copied or moved). If they were "
                "edited, validation metrics before and after are not comparable.",
                self._name,
            )  # fmt: skip

    def start_prefetch(self) -> None:
        """Does nothing: part of grain's checkpoint protocol. The workers start with the next batch."""

    def close(self) -> None:
        """Ends the workers. Asking for a further batch starts new ones."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def __enter__(self) -> PipelineIterator:
        return self

    def __exit__(self, *exception) -> None:
        self.close()
