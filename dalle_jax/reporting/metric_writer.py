"""What a training run tells the world: metrics.jsonl, TensorBoard, sample pictures, and the progress line.

Only process 0 writes; on the others every method is a no-op.  On object storage all of it is copied there from a local
folder: once a minute, with every `flush`, and at the end.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from PIL import Image
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tensorboardX.proto.summary_pb2 import Summary

from dalle_jax.storage.files import write_atomically, write_errors
from dalle_jax.storage.mirror import Mirror

_FLUSH_SECONDS = 10.0


_LARGEST_EVENT_FILE = 16 << 20  # bytes


class MetricWriter:
    """Appends scalars and pictures of one run to its workdir.

    Files: `metrics.jsonl` (one JSON object per line: "step" and scalars; a value that is not finite is null),
    `tensorboard/` (the same), `samples/<name>_<step>.png`.
    """

    def __init__(self, workdir: str, *, start: int = 0):
        """Opens the files.

        Args:
          workdir: an existing directory.
          start: step at which the run goes on.  Lines of later steps, left by a run that got further than its last
            checkpoint, are dropped: they will be written again.
        """
        self._active = jax.process_index() == 0
        if not self._active:
            return
        self._mirror = Mirror(workdir)
        path = self._mirror.folder / "metrics.jsonl"
        self._name = os.path.join(workdir, path.name)
        with write_errors(self._name):
            self._mirror.fetch(path.name)
            kept = [line for line in _lines(path) if line["step"] <= start]
            write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
            self._jsonl = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (closed by close())
            (self._mirror.folder / "samples").mkdir(exist_ok=True)
            self._board = _TensorBoard(self._mirror.folder / "tensorboard", start)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes scalars of one step."""
        if not self._active or not values:
            return
        plain = {name: float(value) for name, value in values.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in plain.items()}
        with write_errors(self._name):
            self._jsonl.write(json.dumps({"step": step, **finite}) + "\n")
            self._board.write(step, [Summary.Value(tag=name, simple_value=value) for name, value in plain.items()])
            self._mirror.upload_now_and_then()

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """Writes a picture, uint8 [H, W, 3]."""
        if not self._active:
            return
        path = self._mirror.folder / "samples" / f"{name}_{step:07d}.png"
        with write_errors(path):
            Image.fromarray(picture).save(path)
            height, width, _ = picture.shape
            image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=path.read_bytes())
            self._board.write(step, [Summary.Value(tag=name, image=image)])

    def flush(self) -> None:
        """Sees to it that what was written outlives the process."""
        if self._active:
            with write_errors(self._name):
                self._board.flush()
                self._mirror.upload()

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._active:
            with write_errors(self._name):
                self._jsonl.close()
                self._board.close()
                self._mirror.close()


class _TensorBoard:
    """Event files written in this thread, so that a full disk is noticed where it can be told.

    TensorBoard reads the files of a folder in the order of their names; none grows so large that copying it whole to
    object storage would take long.
    """

    def __init__(self, folder: pathlib.Path, start: int):
        folder.mkdir(exist_ok=True)
        self._folder, self._files = folder, itertools.count()
        self._start = start
        self._open()
        # The first event hides steps that will be written again.
        log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._events.write_event(event_pb2.Event(wall_time=time.time(), step=start + 1, session_log=log))

    def _open(self) -> None:
        # The suffix keeps files of one second apart, and in order.
        suffix = f".{os.getpid()}.{self._start}.{next(self._files):04d}"
        self._events = EventsWriter(os.path.join(self._folder, "events"), suffix)
        self._flushed, self._size = time.monotonic(), 0

    def write(self, step: int, values: list[Summary.Value]) -> None:
        event = event_pb2.Event(wall_time=time.time(), step=step, summary=Summary(value=values))
        if self._size > _LARGEST_EVENT_FILE:
            self._events.close()
            self._open()
        self._events.write_event(event)
        self._size += event.ByteSize()
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        self._events.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._events.close()


def read_metrics(workdir: str) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, in order ([] where there is none)."""
    return list(_lines(epath.Path(workdir) / "metrics.jsonl"))


def _lines(path: epath.PathLike) -> Iterator[dict[str, Any]]:
    path = epath.Path(path)
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue  # the last line of a process that was killed while writing
