"""The preview image of every task: one caption per row, with its images in named columns.

B rows of a batch    R rows of the image    H, W image size
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from dalle_jax.data.spread import evenly
from dalle_jax.errors import ConfigError
from dalle_jax.reporting.images import image_grid

_SMALLEST, _LARGEST = 96, 256  # side of a shown image, pixels
_ROWS_PER_BLOCK = 8


def shown_rows(valid: Any, count: int) -> np.ndarray:
    """Returns up to `count` rows that hold an example, spread evenly over all that do.

    Args:
      valid: bool [B], false for padding and unreadable examples.
      count: the largest number of rows.

    Returns:
      Rows in rising order, int [R].
    """
    rows = np.flatnonzero(np.asarray(valid))
    return rows[evenly(len(rows), count)] if len(rows) else rows


def own_captions(config: ConfigDict) -> list[str]:
    """Returns the captions in `config.preview.captions`, separated by "|"; [] to preview held-out examples.

    Raises:
      ConfigError: an empty caption between two others.
    """
    given = config.get("preview", {}).get("captions", "")
    captions = [caption.strip() for caption in given.split("|")] if given.strip() else []
    if "" in captions:
        raise ConfigError(
            f"config.preview.captions={given!r} has an empty caption; expected one between each two '|', such as "
            "--config.preview.captions='a red circle|a green star'."
        )
    return captions


def preview_grid(captions: Sequence[str], columns: Sequence[tuple[str, Sequence[np.ndarray]]]) -> np.ndarray:
    """Draws the rows of a preview; more than eight stand in two blocks.

    Args:
      captions: one for each row; "" for none.
      columns: heading and images, uint8 [R, H, W, 3], of each column.

    Returns:
      uint8 [H', W', 3].
    """
    size = int(np.clip(len(columns[0][1][0]), _SMALLEST, _LARGEST))
    rows = [(caption, [images[i] for _, images in columns]) for i, caption in enumerate(captions)]
    blocks = 2 if len(rows) > _ROWS_PER_BLOCK else 1
    return image_grid(rows, [heading for heading, _ in columns], cell_size=size, blocks=blocks)
