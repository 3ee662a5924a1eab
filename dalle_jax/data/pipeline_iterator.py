"""An iterator over the batches of a pipeline, which threads or worker processes create ahead of time.

grain runs `ExampleMaker` in threads, or in processes if `workers` is set. Every batch is a pure function of its number
(examples.py). The state of an iterator is therefore that number and a description of the run that counts it. It is
equal on every host, and a run may resume with another number of hosts or workers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import grain
import numpy as np
from absl import flags, logging

from dalle_jax.data import workers as worker_processes
from dalle_jax.data.examples import ExampleMaker
from dalle_jax.data.tally import Note, Tally
from dalle_jax.errors import CheckpointError, DataChanged
from dalle_jax.storage import json_files

LAST_BATCH = sys.maxsize // 2**20  # "endless": the positions of every batch fit in 64 bits


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Creates the batches with given numbers; picklable."""

    make: ExampleMaker
    numbers: np.ndarray

    def __call__(self, place: int) -> tuple[dict[str, np.ndarray], tuple[Note, ...]]:
        return self.make(int(self.numbers[place]))


Make = ExampleMaker | Chosen


class PipelineIterator(Iterator[dict[str, np.ndarray]]):
    """An iterator over batches whose state is the number of delivered batches.

    `get_state` and `set_state` use bytes (JSON), so that grain's checkpoint handler accepts it too.

    Attributes:
      notes: on the examples of the last batch: those that were skipped, and captions that were truncated.
    """

    def __init__(
        self,
        make: Make,
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
        self.notes: tuple[Note, ...] = ()
        self._batches: grain.DatasetIterator | None = None

    def __next__(self) -> dict[str, np.ndarray]:
        if self._delivered >= self._last:
            self.close()
            raise StopIteration
        starting = self._batches is None
        with worker_processes.signals_blocked() if starting and self._workers else contextlib.nullcontext():
            if starting:
                self._batches = iter(self._dataset(self._delivered))
            batch, self.notes = next(self._batches)  # the first one starts the workers
        self._delivered += 1
        self._tally.add(self.notes, rows=int(batch["valid"].sum()) if "valid" in batch else len(batch["index"]))
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
        if self._last < LAST_BATCH:  # Shared memory of a pass that ends is never released by grain: use pipes.
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
