"""Moves aside what stands in the way of a run's files on a local disk: damaged files, and folders in their place.

Nothing is deleted. The log of a training is not worth the training.
"""

from __future__ import annotations

import itertools
import os

from absl import logging
from etils import epath


def move_aside(path: epath.PathLike, why: str) -> None:
    """Renames a local file or folder to NAME.damaged, or NAME.damaged-2 and so on, and logs it.

    Args:
      path: what stands in the way.
      why: what is wrong with it, for the log.
    """
    numbers = itertools.count(2)
    aside = f"{os.fspath(path)}.damaged"
    while os.path.lexists(aside):
        aside = f"{os.fspath(path)}.damaged-{next(numbers)}"
    os.rename(path, aside)
    logging.warning("%s: %s. It is kept as %s.", path, why, os.path.basename(aside))


def make_way_for_file(path: epath.PathLike) -> None:
    """Moves a local folder aside that stands in the place of a file."""
    if os.path.isdir(path):
        move_aside(path, "expected a file, found a folder")


def make_folder(path: epath.PathLike) -> None:
    """Creates a local folder, and moves aside what stands in its place or cannot be written."""
    if os.path.lexists(path) and not (os.path.isdir(path) and os.access(path, os.W_OK | os.X_OK)):
        move_aside(path, "expected a folder that can be written")
    os.makedirs(path, exist_ok=True)
