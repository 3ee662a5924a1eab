"""TensorBoard's event files of a run.

TensorBoard sorts groups of curves by name. The loss is therefore in the first group, "loss"; see `tag_of`. Training
values that never change, such as counts that stay 0, are not written, because each would fill a chart with one line.
"""

from __future__ import annotations

import itertools
import os
import pathlib
import re
import time
from collections.abc import Mapping

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from dalle_jax.storage.obstacles import make_folder

_FLUSH_SECONDS = 10.0
_LARGEST_FILE = 16 << 20  # bytes; the upload of a changed file copies all of it
# Names of training values without "train/", by the group that they are shown in. Others are metrics.
_GROUPS = {
    "optimizer": r"learning_rate|gradient_norm|skipped|temperature|\w+_weight",
    "time": r"seconds_.*|examples_per_second",
    "skipped_data": r"left_out/.*|captions_.*",
}


def tag_of(name: str) -> str:
    """Returns the tag under which TensorBoard shows a value: "loss/train", "metrics/psnr (eval)", "time/…".

    Args:
      name: "train/…" or "eval/…"; any other name is its own tag.
    """
    kind, slash, rest = name.partition("/")
    if not slash or kind not in ("train", "eval"):
        return name
    if rest == "loss":
        return f"loss/{kind}"
    if kind == "train":
        for group, pattern in _GROUPS.items():
            if re.fullmatch(pattern, rest):
                return f"{group}/{rest}"
    return f"metrics/{rest} ({kind})"


class TensorBoard:
    """Event files, written in the calling thread.

    tensorboardX's `SummaryWriter` writes in a background thread. A full disk ends that thread, and after ten more
    events the training waits for it forever. Its `EventsWriter` raises in the caller instead.

    TensorBoard reads the files of a folder in the order of their names.
    """

    def __init__(self, folder: pathlib.Path, start: int):
        """Opens a file in `folder`. TensorBoard then hides earlier events after step `start`."""
        make_folder(folder)
        self._folder, self._start, self._files = folder, start, itertools.count()
        self._waiting: dict[str, tuple[int, float] | None] = {}  # first values, until another one; None: written
        self._open()
        restart = SessionLog(status=SessionLog.START)  # hides earlier events from its step on
        self._writer.write_event(Event(wall_time=time.time(), step=start + 1, session_log=restart))

    def _open(self) -> None:
        # The suffix distinguishes and orders files of the same second.
        suffix = f".{os.getpid()}.{self._start}.{next(self._files):04d}"
        self._writer = EventsWriter(os.path.join(self._folder, "events"), suffix)
        self._flushed, self._size = time.monotonic(), 0

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the values of a step by name. A training value waits until it has changed once."""
        shown = []
        for name, value in values.items():
            if name.startswith("train/") and name != "train/loss":
                first = self._waiting.setdefault(name, (step, value))
                if first is not None and first[1] == value:
                    continue
                if first is not None:
                    self._write(first[0], [Summary.Value(tag=tag_of(name), simple_value=first[1])])
                    self._waiting[name] = None
            shown.append(Summary.Value(tag=tag_of(name), simple_value=value))
        if shown:
            self._write(step, shown)

    def image(self, step: int, name: str, encoded: bytes, height: int, width: int) -> None:
        """Writes an image, the bytes of a PNG file."""
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encoded)
        self._write(step, [Summary.Value(tag=name, image=image)])

    def _write(self, step: int, values: list[Summary.Value]) -> None:
        if self._size > _LARGEST_FILE:
            self._writer.close()
            self._open()
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=values))
        self._writer.write_event(event)
        self._size += event.ByteSize()
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Flushes the events to disk."""
        self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Flushes and closes the file."""
        self._writer.close()
