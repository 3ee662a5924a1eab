"""Reports of a training run on disk: metrics.jsonl, TensorBoard's event files, sample images and a page.

Only the first host writes; on the others every method does nothing. On object storage all files are copied there from
a local folder: once a minute, at every `flush`, and at the end.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from dalle_jax.errors import ConfigError, UserError
from dalle_jax.reporting import weights_and_biases
from dalle_jax.reporting.images import png
from dalle_jax.reporting.tensorboard import TensorBoard
from dalle_jax.storage import json_files
from dalle_jax.storage.errors import storage_cause
from dalle_jax.storage.files import expanded, is_other_than_file, is_remote, write_atomically, write_errors
from dalle_jax.storage.mirror import Mirror
from dalle_jax.storage.obstacles import make_folder, move_aside

TENSORBOARD, WANDB = "tensorboard", "wandb"


def writers_of(names: str) -> list[str]:
    """Returns the names in `config.metric_writers`, separated by commas.

    Raises:
      ConfigError: an unknown name, or a writer whose package is missing.
    """
    found = [name.strip() for name in names.split(",") if name.strip()]
    if unknown := [name for name in found if name not in (TENSORBOARD, WANDB)]:
        raise ConfigError(
            f"config.metric_writers={names!r} names {unknown[0]!r}; expected {TENSORBOARD}, {WANDB}, both with a comma "
            "between them, or '' for metrics.jsonl alone."
        )
    if WANDB in found:
        weights_and_biases.check_installed()
    return found


class MetricWriter:
    """Appends scalars and images of one run to its workdir.

    Files: `metrics.jsonl` (one JSON object per line: "step" and scalars, null if not finite), `tensorboard/` (the same
    values, and the images), `samples/<name>_<step>.png`, `index.html`. Weights & Biases gets values and images too if
    it is one of the writers.
    """

    def __init__(
        self,
        workdir: str,
        *,
        start: int = 0,
        writers: str = TENSORBOARD,
        config: Mapping[str, Any] | None = None,
    ):
        """Opens the files.

        Args:
          workdir: an existing directory.
          start: number of steps done. Lines of later steps are removed, because the run writes them again.
          writers: writers in addition to `metrics.jsonl`, see `writers_of`.
          config: the configuration, for writers that show it.

        A damaged file stops nothing: its readable lines stay, and the file is kept under another name.
        """
        self._active = jax.process_index() == 0
        if not self._active:
            return
        self._mirror, names = Mirror(workdir), writers_of(writers)
        folder = self._mirror.folder
        path = folder / "metrics.jsonl"
        # The only writer that may be out of reach comes first.
        self._wandb = weights_and_biases.WeightsAndBiases(workdir, folder, config or {}) if WANDB in names else None
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
            self._events = TensorBoard(folder / "tensorboard", start) if TENSORBOARD in names else None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes scalars of one step."""
        if not self._active or not values:
            return
        plain = {name: float(value) for name, value in values.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in plain.items()}
        with write_errors(self._name):
            self._jsonl.write(json.dumps({"step": step, **finite}) + "\n")
            if self._events is not None:
                self._events.scalars(step, plain)
            if self._wandb is not None:
                self._wandb.scalars(step, plain)
            self._mirror.upload_now_and_then()

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes an image, uint8 [H, W, 3]."""
        if not self._active:
            return
        path = self._mirror.folder / "samples" / f"{name}_{step:07d}.png"
        with write_errors(path):
            encoded = png(image)
            write_atomically(path, encoded)
            if self._events is not None:
                self._events.image(step, name, encoded, *image.shape[:2])
            if self._wandb is not None:
                self._wandb.image(step, name, path)

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
                if self._events is not None:
                    self._events.flush()
                self._mirror.upload()

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._active:
            with write_errors(self._name):
                self._jsonl.close()
                if self._events is not None:
                    self._events.close()
                if self._wandb is not None:
                    self._wandb.close()
                self._mirror.close()


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
