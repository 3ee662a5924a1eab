"""A training's own page, `<workdir>/index.html`: progress, curves, previews over time, data and configuration.

It is written at each evaluation and preview, and at the end. It loads nothing from outside. A browser reads it again
every minute while the training runs.
"""

from __future__ import annotations

import contextlib
import datetime
import io
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from dalle_jax.checkpoints.compatibility import to_json
from dalle_jax.data.sources.decoding import decode_image
from dalle_jax.data.sources.record import Record, UnreadableExample
from dalle_jax.data.spread import evenly
from dalle_jax.distributed.turns import is_first
from dalle_jax.errors import UserError
from dalle_jax.reporting import curves
from dalle_jax.reporting.html import (
    code,
    details,
    folded,
    heading,
    image,
    page,
    paragraph,
    progress_bar,
    side_by_side,
    table,
)
from dalle_jax.reporting.metric_writer import MetricWriter
from dalle_jax.reporting.progress import Progress, duration, until
from dalle_jax.reporting.tables import plain_text
from dalle_jax.storage import json_files
from dalle_jax.storage.files import expanded
from dalle_jax.tasks.task import Job

_REFRESH = 60  # seconds
_MOST_PREVIEWS = 6
_LARGE = 200_000  # bytes of a preview; a larger one is embedded as a smaller JPEG
_JPEG_WIDTH = 1200

Lines = Sequence[Mapping[str, Any]]


class RunPage:
    """Writes the page of a training from what its workdir holds. Only the first host writes."""

    def __init__(self, config: ConfigDict, workdir: str, job: Job, writer: MetricWriter, progress: Progress):
        """Creates nothing yet.

        Args:
          config: the training configuration.
          workdir: of the run.
          job: task and data.
          writer: has the metrics and previews, and writes the page.
          progress: knows the time left.
        """
        self._config, self._workdir, self._job = config, workdir, job
        self._writer, self._progress = writer, progress

    def write(self, step: int, said: str = "") -> None:
        """Writes the page.

        Args:
          step: number of steps done.
          said: the summary of a training that has ended, in lines; "" while it runs.

        Raises:
          UserError: the file cannot be written.
        """
        if not is_first():
            return
        lines = self._writer.lines()
        parts = [
            paragraph(_status(step, self._config.steps, None if said else self._progress.left(step), bool(said))),
            progress_bar(step, self._config.steps),
            *[part for line in said.splitlines() for part in _said(line)],
            heading("Curves"),
            side_by_side(_curves(lines)) or paragraph("Nothing was logged yet."),
        ]
        if found := _evaluations(lines):
            parts += [heading("The latest evaluation"), table(found, explain=True)]
        if shown := _previews(self._writer.samples("preview")):
            parts += [
                heading("Previews"),
                paragraph("The same captions or images each time, the latest first. Click to enlarge."),
                side_by_side([image(content, f"step {number:,}") for number, content in reversed(shown)], wide=True),
            ]
        parts += [heading("Data"), table({"": self._data(step)}), *self._examples()]
        parts += [details("Configuration", plain_text(to_json(self._config)))]
        title = f"{self._workdir}: {self._job.task.title}"
        self._writer.page(page(title, parts, refresh=None if said else _REFRESH))

    def _data(self, step: int) -> dict[str, Any]:
        """Returns what is known about the data, by name."""
        found: dict[str, Any] = {}
        survey = self._survey()
        if survey.get("source"):
            found["source"] = " ".join(str(survey[key]) for key in ("source", "path") if survey.get(key))
        if examples := self._job.examples:
            found |= {"training examples": f"{examples:,}", "epochs so far": step * self._config.batch_size / examples}
        if self._job.held_out:
            found["held-out examples"] = f"{self._job.held_out:,}"
        counts = self._job.data_counts()
        found |= {name.replace("_", " "): f"{count:,}" for name, count in counts.items() if count}
        if captions := (survey.get("captions") or {}).get("first"):
            found["captions"] = " · ".join(map(str, captions[:3]))
        return found

    def _survey(self) -> dict[str, Any]:
        """Returns the content of `data.json`; {} without a readable one."""
        try:
            return json_files.read(expanded(self._workdir) / "data.json", dict, UserError, "")
        except UserError:
            return {}

    def _examples(self) -> list[str]:
        """Returns the image that shows training examples, folded, if there is one."""
        with contextlib.suppress(OSError):
            sheet = (expanded(self._workdir) / "samples" / "data.png").read_bytes()
            return [folded("Training examples", image(sheet, "Images as the model sees them, with their captions."))]
        return []


def _status(step: int, total: int, left: float | None, finished: bool) -> str:
    now = f"{datetime.datetime.now():%Y-%m-%d %H:%M}"
    if finished:
        return f"Finished at step {step:,} of {total:,}, {now}."
    remaining = "" if left is None else f", about {duration(left)} of training left{until(left)}"
    return f"Step {step:,} of {total:,} at {now}{remaining}."


def _said(line: str) -> list[str]:
    """Returns a line of the summary. A command in it can be copied."""
    label, separator, command = line.partition(": python -m ")
    return [paragraph(f"{label}:"), code(f"python -m {command}")] if separator else [paragraph(line)]


def _curves(lines: Lines) -> list[str]:
    """Plots the loss, each metric of evaluations, and the step size. Constant and repeated ones are left out."""
    seen, plots = set(), []
    for name in dict.fromkeys(["loss", *curves.measured(lines), "learning_rate"]):
        values = tuple(line[key] for line in lines for key in (f"train/{name}", f"eval/{name}") if key in line)
        if len(set(values)) > 1 and values not in seen:
            plots.append(curves.curve(lines, name))
        seen.add(values)
    return plots


def _evaluations(lines: Lines) -> dict[str, dict[str, Any]]:
    """Returns the metrics of the last and of the first evaluation, by step."""
    found = [(line["step"], {name[5:]: x for name, x in line.items() if name.startswith("eval/")}) for line in lines]
    found = [(step, metrics) for step, metrics in found if metrics]
    return {f"step {step:,}": metrics for step, metrics in found[-1:] + found[:1]}


def _previews(files: Mapping[int, epath.Path]) -> list[tuple[int, bytes]]:
    """Reads up to six previews, spread evenly over the steps: step and file content.

    Large ones become JPEG files, unreadable ones are left out.
    """
    steps, found = list(files), []
    for place in evenly(len(steps), _MOST_PREVIEWS):
        step = steps[place]
        with contextlib.suppress(OSError, UnreadableExample):
            content = files[step].read_bytes()
            found.append((step, _as_jpeg(content, files[step].name) if len(content) > _LARGE else content))
    return found


def _as_jpeg(content: bytes, name: str) -> bytes:
    shown, encoded = Image.fromarray(decode_image(Record(content, (), name, {}))), io.BytesIO()
    shown.thumbnail((_JPEG_WIDTH, shown.height))
    shown.save(encoded, format="JPEG", quality=85)
    return encoded.getvalue()
