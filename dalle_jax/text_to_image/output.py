"""Drawn images as callers want to hold them: arrays or PIL images, all at once or one by one, with a progress bar.

C captions    n images per caption    H, W image size
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from PIL import Image
from tqdm.std import tqdm

from dalle_jax.configuration.values import shown
from dalle_jax.errors import ConfigError
from dalle_jax.text_to_image.showing import in_notebook

NUMPY, PIL = "numpy", "pil"

Chunk = tuple[int, int, np.ndarray]  # of `TextToImage.chunks`
Images = np.ndarray | list  # uint8 [..., H, W, 3], or PIL images in lists of the same shape


def check(output: Any, stream: Any, progress: Any, candidates: Any) -> None:
    """Checks how `TextToImage.generate` returns images; raises a ConfigError."""
    check_output(output)
    check_progress(progress)
    if not isinstance(stream, bool):
        raise ConfigError(f"stream is {shown(stream)}; expected True or False.")
    if stream and candidates is not None:
        raise ConfigError(
            f"stream is True, but candidates is {shown(candidates)}: CLIP compares all candidates before the first "
            "image can be returned. Leave out one of them."
        )


def check_output(output: Any) -> None:
    """Raises a ConfigError if `output` is neither "numpy" nor "pil"."""
    if not isinstance(output, str) or output not in (NUMPY, PIL):
        raise ConfigError(f"output is {shown(output)}; expected {NUMPY!r} (arrays) or {PIL!r} (PIL images).")


def check_progress(progress: Any) -> None:
    """Raises a ConfigError if `progress` is none of True, False and None."""
    if not (progress is None or isinstance(progress, bool)):
        raise ConfigError(
            f"progress is {shown(progress)}; expected True, False, or None (if there is much to wait for)."
        )


def converted(images: np.ndarray, output: str) -> Images | Image.Image:
    """Returns images as they are, or as PIL images.

    Args:
      images: uint8 [..., H, W, 3].
      output: "numpy" or "pil".

    Returns:
      The array; or a PIL image for [H, W, 3], a list of them for [n, H, W, 3], and a list of lists for [C, n, H, W, 3].
    """
    if output == NUMPY:
        return images
    return Image.fromarray(images) if images.ndim == 3 else [converted(each, output) for each in images]


def one_by_one(chunks: Iterable[Chunk], output: str) -> Iterator[np.ndarray | Image.Image]:
    """Yields the single images of chunks: all images of a caption, then those of the next one."""
    for _, _, images in chunks:
        for image in images.reshape(-1, *images.shape[2:]):
            yield converted(image, output)


def with_bar(chunks: Iterable[Chunk], total: int, rows_at_once: int, progress: bool | None) -> Iterator[Chunk]:
    """Yields chunks and shows a progress bar on stderr.

    Args:
      chunks: of `TextToImage.chunks`.
      total: number of images in all chunks.
      rows_at_once: largest number of images of a chunk.
      progress: whether to show the bar. None shows it to a person, on a terminal or in a notebook, who would wait for
        more than one chunk.
    """
    if progress is None:
        progress = total > rows_at_once and _is_watched()
    with tqdm(total=total, unit="image", disable=not progress) as bar, contextlib.closing(iter(chunks)) as drawing:
        for chunk in drawing:
            bar.update(chunk[2].shape[0] * chunk[2].shape[1])
            yield chunk


def _is_watched() -> bool:
    return sys.stderr.isatty() or in_notebook()
