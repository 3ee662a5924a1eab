"""Shows drawn images to a person, and saves them as files.

from dalle_jax import TextToImage, save, show
images = TextToImage.load("runs/quickstart/maskgit").generate("a red circle above a blue square", n=8)
show(images)
save(images, "drawn")

C captions    n images per caption    H, W image size
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image, ImageShow

from dalle_jax.configuration.values import natural
from dalle_jax.errors import DataError, UserError
from dalle_jax.reporting.contact_sheet import Shown, contact_sheet
from dalle_jax.reporting.images import save_png
from dalle_jax.storage.files import expanded, write_errors, write_file
from dalle_jax.text_to_image import inputs

_MOST_COLUMNS = 100


def show(images: Any, captions: str | Sequence[str] | None = None, columns: int = 8) -> None:
    """Shows images on one sheet: in a notebook below the cell, elsewhere in the system's image viewer.

    Args:
      images: images in any form that `TextToImage.encode` accepts, such as those of `generate`. Or C groups of images:
        [C, n, H, W, 3] or a list of lists.
      captions: a caption for each image; for groups, one for each group. A string is the caption of all.
      columns: largest number of images in a row.

    Raises:
      DataError: no image, or another number of captions.
      UserError: the system has no image viewer.
    """
    columns = natural("columns", columns, 1, _MOST_COLUMNS)
    if isinstance(images, Iterator):
        images = list(images)
    if _is_grouped(images):
        groups = [
            (caption, [Shown(pixels, "") for pixels in inputs.pixels_of_each(group)])
            for group, caption in _paired(images, captions)
        ]
    else:
        groups = [("", [Shown(pixels, caption) for pixels, caption in _each(images, captions)])]
    if not any(shown for _, shown in groups):
        raise DataError("No image was given; expected at least one.")
    columns = min(columns, max(len(shown) for _, shown in groups))
    sheet = Image.fromarray(contact_sheet(groups, columns=columns))
    if in_notebook():
        import IPython.display

        IPython.display.display(sheet)
    elif not ImageShow.show(sheet):
        raise UserError("This system has no image viewer: dalle_jax.save(images, folder) writes PNG files.")


def in_notebook() -> bool:
    """Returns whether this process is the kernel of a notebook. Other programs import IPython, too."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


def save(images: Any, folder: str | epath.PathLike, captions: str | Sequence[str] | None = None) -> list[str]:
    """Writes images as numbered PNG files, `0000.png` and so on. Files that are already there stay.

    With captions, each image has its caption in a text file of the same name. Such a folder is a data set for training
    (`--config.data.path`).

    Args:
      images: as for `show`; or an iterator, whose images are written as they come: `generate(…, stream=True)`.
      folder: where to write, local or "gs://…". It is created if it does not exist.
      captions: as for `show`.

    Returns:
      The paths of the images, in order.

    Raises:
      DataError: no image, something else than images, or another number of captions.
      UserError: a file cannot be written.
    """
    out, paths = expanded(folder), []
    for number, (pixels, caption) in enumerate(_each(images, captions), _free_number(out)):
        path = out / f"{number:04d}.png"
        save_png(path, pixels)
        if caption:
            write_file(path.with_suffix(".txt"), f"{caption}\n")
        paths.append(str(path))
    if not paths:
        raise DataError("No image was given; expected at least one.")
    return paths


def _free_number(folder: epath.Path) -> int:
    """Returns the number after the largest one of a file in a folder."""
    with write_errors(folder):
        names = [path.stem for path in folder.iterdir()] if folder.exists() else []
    return max((int(name) + 1 for name in names if name.isascii() and name.isdigit()), default=0)


def _is_grouped(images: Any) -> bool:
    """Returns whether images are C groups of images: [C, n, H, W, 3], or a list of lists or of arrays [n, H, W, 3]."""
    if getattr(images, "ndim", 0) == 5:
        return True
    if not isinstance(images, list | tuple) or not images:
        return False
    return all(getattr(group, "ndim", 0) == 4 or inputs.are_images(group) for group in images)


def _each(images: Any, captions: str | Sequence[str] | None) -> Iterator[tuple[np.ndarray, str]]:
    """Yields each image, uint8 [H, W, 3], with its caption, or "" without one."""
    if isinstance(images, Iterator):
        yield from ((inputs.one(image), caption) for image, caption in _paired(images, captions))
    elif _is_grouped(images):
        for group, caption in _paired(images, captions):
            yield from ((pixels, caption) for pixels in inputs.pixels_of_each(group))
    else:
        yield from _paired(inputs.pixels_of_each(images), captions)


def _paired(items: Iterable[Any], captions: str | Sequence[str] | None) -> Iterator[tuple[Any, str]]:
    """Yields each item with its caption. One caption holds for all items; None stands for "".

    Raises:
      DataError: another number of captions than of items.
    """
    if captions is None or isinstance(captions, str):
        yield from ((item, captions or "") for item in items)
        return
    each = inputs.captions(captions)
    mismatch = "{} images or groups of images and {} captions; expected one caption for each."
    if not isinstance(items, Iterator) and len(items) != len(each):
        raise DataError(mismatch.format(len(items), len(each)))
    try:
        yield from zip(items, each, strict=True)
    except ValueError as error:  # an iterator has no length before its end
        if isinstance(error, UserError):
            raise
        raise DataError(mismatch.format("Other numbers of", len(each))) from error
