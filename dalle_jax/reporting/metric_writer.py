"""Reports of a training run on disk: metrics.jsonl, TensorBoard's event files, sample images and a page.

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
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from dalle_jax.errors import UserError
from dalle_jax.reporting.images import png
from dalle_jax.storage import json_files
from dalle_jax.storage.errors import storage_cause
from dalle_jax.storage.files import expanded, is_other_than_file, is_remote, write_atomically, write_errors
from dalle_jax.storage.mirror import Mirror
from dalle_jax.storage.obstacles import make_folder, move_aside

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

        A damaged file stops nothing: its readable lines stay, and the file is kept under another name.
        """
        self._active = jax.process_index() == 0
        if not self._active:
            return
        self._mirror = Mirror(workdir)
        path = self._mirror.folder / "metrics.jsonl"
        self._name = os.path.join(workdir, path.name)
        with write_errors(self._name):
            self._mirror.fetch(path.name)
            lines, wrong = _read(path)
            if wrong:
                move_aside(path, wrong)
            kept = [line for line in lines if line["step"] <= start]
            write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
            self._jsonl = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (closed by close())
            make_folder(self._mirror.folder / "samples")
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

    def lines(self) -> list[dict[str, Any]]:
        """Returns the lines of `metrics.jsonl`, as `read_metrics`; [] on other hosts than the first one."""
        return read_metrics(str(self._mirror.folder)) if self._active else []

    def samples(self, name: str) -> dict[int, epath.Path]:
        """Returns the PNG files of an image that was written at several steps, by step in rising order."""
        if not self._active:
            return {}
        found: dict[int, epath.Path] = {}
        with write_errors(self._name):
            for folder in (epath.Path(os.path.dirname(self._name)), epath.Path(self._mirror.folder)):
                folder = folder / "samples"
                for path in folder.glob(f"{name}_*.png") if folder.exists() else ():
                    if (step := path.stem.removeprefix(f"{name}_")).isdecimal() and not is_other_than_file(path):
                        found[int(step)] = path
        return dict(sorted(found.items()))

    def page(self, text: str) -> None:
        """Writes `index.html`."""
        if self._active:
            path = self._mirror.folder / "index.html"
            with write_errors(path):
                write_atomically(path, text.encode())

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
        make_folder(folder)
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
    """Reads the readable lines of a run's metrics.jsonl in order; [] without such a file.

    Each line has an int "step", and values that are finite numbers or None.
    """
    return _read(expanded(workdir) / "metrics.jsonl")[0]


def _read(path: epath.PathLike) -> tuple[list[dict[str, Any]], str]:
    """Returns the readable lines of a metrics.jsonl, and what is wrong with the file, "" for nothing."""
    if is_other_than_file(path):
        return [], "expected a file, found a folder or a device"
    try:
        content = epath.Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return [], ""
    except OSError as error:
        if is_remote(path):  # it is not damaged: the storage cannot be reached
            raise UserError(f"{path} cannot be read: {storage_cause(error) or error}. Try again later.") from error
        return [], f"it cannot be read ({error.strerror})"
    *lines, last = content.split(b"\n")
    found = [(number, _values(line)) for number, line in enumerate(lines, 1) if line.strip()]
    damaged = [number for number, values in found if values is None]
    found.append((0, _values(last)))  # without a line feed: half a line, if its process was killed while writing
    wrong = ""
    if damaged:
        wrong = f"{len(damaged):,} of {len(lines):,} lines are damaged and left out, the first is line {damaged[0]}"
    return [values for _, values in found if values is not None], wrong


def _values(line: bytes) -> dict[str, Any] | None:
    """Returns the step and the values of a line, or None if it is damaged."""
    try:
        values = json_files.parse(line)
        kinds = {type(value) for value in values.values()} <= {int, float, type(None)}
        if not kinds or type(values["step"]) is not int or not 0 <= values["step"] < 2**63:
            return None
        return {name: value if _is_finite(value) else None for name, value in values.items()}
    except (ValueError, KeyError):
        return None


def _is_finite(value: float | None) -> bool:
    try:
        return value is not None and math.isfinite(value)
    except OverflowError:  # an int beyond every float
        return False
