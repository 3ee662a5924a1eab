"""Reports of a training run on disk: metrics.jsonl, TensorBoard's event files and sample images.

Only the first host writes; on the others every method does nothing. On object storage all files are copied there from
a local folder: once a minute, at every `flush`, and at the end.
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
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from dalle_jax.reporting.images import png
from dalle_jax.storage.files import write_atomically, write_errors
from dalle_jax.storage.mirror import Mirror

_FLUSH_SECONDS = 10.0
_LARGEST_EVENT_FILE = 16 << 20  # bytes; the upload of a changed file copies all of it


class MetricWriter:
    """Appends scalars and images of one run to its workdir.

    Files: `metrics.jsonl` (one JSON object per line: "step" and scalars, null if not finite), `tensorboard/` (the same
    values, and the images), `samples/<name>_<step>.png`.
    """

    def __init__(self, workdir: str, *, start: int = 0):
        """Opens the files.

        Args:
          workdir: an existing directory.
          start: number of steps done. Lines of later steps are removed, because the run writes them again.
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
            self._events = _EventFiles(self._mirror.folder / "tensorboard", start)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes scalars of one step."""
        if not self._active or not values:
            return
        plain = {name: float(value) for name, value in values.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in plain.items()}
        with write_errors(self._name):
            self._jsonl.write(json.dumps({"step": step, **finite}) + "\n")
            self._events.write(step, [Summary.Value(tag=name, simple_value=value) for name, value in plain.items()])
            self._mirror.upload_now_and_then()

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes an image, uint8 [H, W, 3]."""
        if not self._active:
            return
        path = self._mirror.folder / "samples" / f"{name}_{step:07d}.png"
        with write_errors(path):
            encoded = png(image)
            write_atomically(path, encoded)
            height, width, _ = image.shape
            event = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encoded)
            self._events.write(step, [Summary.Value(tag=name, image=event)])

    def flush(self) -> None:
        """Flushes everything to disk and to object storage."""
        if self._active:
            with write_errors(self._name):
                self._events.flush()
                self._mirror.upload()

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._active:
            with write_errors(self._name):
                self._jsonl.close()
                self._events.close()
                self._mirror.close()


class _EventFiles:
    """TensorBoard's event files, written in the calling thread.

    tensorboardX's `SummaryWriter` writes in a background thread. A full disk ends that thread, and after ten more
    events the training waits for it forever. Its `EventsWriter` raises in the caller instead.

    TensorBoard reads the files of a folder in the order of their names.
    """

    def __init__(self, folder: pathlib.Path, start: int):
        folder.mkdir(exist_ok=True)
        self._folder, self._start, self._files = folder, start, itertools.count()
        self._open()
        restart = SessionLog(status=SessionLog.START)  # hides earlier events from its step on
        self._writer.write_event(Event(wall_time=time.time(), step=start + 1, session_log=restart))

    def _open(self) -> None:
        # The suffix distinguishes and orders files of the same second.
        suffix = f".{os.getpid()}.{self._start}.{next(self._files):04d}"
        self._writer = EventsWriter(os.path.join(self._folder, "events"), suffix)
        self._flushed, self._size = time.monotonic(), 0

    def write(self, step: int, values: list[Summary.Value]) -> None:
        if self._size > _LARGEST_EVENT_FILE:
            self._writer.close()
            self._open()
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=values))
        self._writer.write_event(event)
        self._size += event.ByteSize()
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._writer.close()


def read_metrics(workdir: str) -> list[dict[str, Any]]:
    """Reads the lines of a run's metrics.jsonl in order; [] without such a file."""
    return list(_lines(epath.Path(workdir) / "metrics.jsonl"))


def _lines(path: epath.PathLike) -> Iterator[dict[str, Any]]:
    path = epath.Path(path)
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue  # the last line of a process that was killed while writing
