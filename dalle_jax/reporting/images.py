"""Pictures and tables for people: grids of captioned pictures, and a run's figures as text and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont

_INK, _FAINT, _PAPER = (32, 33, 36), (95, 99, 104), (255, 255, 255)


def to_uint8(images: Any) -> np.ndarray:
    """float [0, 1] to uint8, rounded; [..., H, W, 3]."""
    return np.round(np.clip(np.asarray(images, np.float32), 0, 1) * 255).astype(np.uint8)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, max_lines: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(word)
    if len(lines) > max_lines:
        lines = lines[:max_lines]
        lines[-1] = lines[-1].rstrip(".,") + " …"
    return lines


def image_grid(
    rows: Sequence[tuple[str, Sequence[np.ndarray]]],
    columns: Sequence[str] = (),
    *,
    title: str = "",
    picture_size: int = 128,
    blocks: int = 1,
) -> np.ndarray:
    """Captions beside their pictures, one caption a row.

    Args:
      rows: (caption, pictures uint8 [H, W, 3]), the same number of pictures in each.
      columns: a heading for each picture column; headings that repeat are written once, over the first.
      title: over everything.
      picture_size: side of a shown picture, in pixels; small pictures are enlarged without smoothing.
      blocks: how many rows stand side by side.

    Returns:
      uint8 [H', W', 3].

    Raises:
      ValueError: where there is no row, or rows differ in length.
    """
    if not rows or len({len(pictures) for _, pictures in rows}) != 1:
        raise ValueError("A grid needs at least one row, and the same number of pictures in each.")
    text_width, gap, margin = 190, 8, 16
    per_row = len(rows[0][1])
    body, small, big = (ImageFont.load_default(size) for size in (15, 13, 20))
    block_width = text_width + per_row * (picture_size + gap) + gap
    lines = -(-len(rows) // blocks)
    top = margin + (34 if title else 0) + (24 if columns else 0)
    sheet = Image.new("RGB", (2 * margin + blocks * block_width, top + lines * (picture_size + gap) + margin), _PAPER)
    pen = ImageDraw.Draw(sheet)
    if title:
        pen.text((margin, margin - 4), title, fill=_INK, font=big)
    for block in range(blocks):
        left = margin + block * block_width
        shown = None
        for i, heading in enumerate(columns):
            if heading != shown:
                pen.text((left + text_width + i * (picture_size + gap), top - 22), heading, fill=_FAINT, font=small)
            shown = heading
    for i, (caption, pictures) in enumerate(rows):
        left, y = margin + (i // lines) * block_width, top + (i % lines) * (picture_size + gap)
        wrapped = _wrap(caption, body, text_width - 2 * gap, max(1, picture_size // 19))
        pen.multiline_text((left, y + 4), "\n".join(wrapped), fill=_INK, font=body, spacing=4)
        for j, picture in enumerate(pictures):
            image = Image.fromarray(np.asarray(picture, np.uint8))
            enlarge = image.width < picture_size
            image = image.resize((picture_size,) * 2, Image.Resampling.NEAREST if enlarge else Image.Resampling.BOX)
            sheet.paste(image, (left + text_width + j * (picture_size + gap), y))
    return np.asarray(sheet)


def save_png(path: epath.PathLike, image: np.ndarray) -> None:
    """Writes uint8 [H, W, 3], local or remote."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        Image.fromarray(image).save(file, format="PNG")
