"""Images for people: grids of captioned images, and PNG files."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image, ImageDraw

from dalle_jax.reporting.fonts import Typeface
from dalle_jax.storage.files import write_file

INK, FAINT, PAPER = (32, 33, 36), (95, 99, 104), (255, 255, 255)


def to_uint8(images: Any) -> np.ndarray:
    """Converts float images in [0, 1] to uint8, rounded: [..., H, W, 3]."""
    return np.round(np.clip(np.asarray(images, np.float32), 0, 1) * 255).astype(np.uint8)


def wrap(text: str, typeface: Typeface, width: int, max_lines: int) -> list[str]:
    """Breaks a text into lines, also inside a word that is wider than a line.

    Args:
      text: any text; its blanks may become ends of lines.
      typeface: draws it.
      width: width of a line in pixels.
      max_lines: the most lines. The last one ends in "…" if the text is longer.
    """
    lines: list[str] = []
    for word in text[: width * max_lines + 1].split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and typeface.length(joined) <= width:
            lines[-1] = joined
            continue
        while typeface.length(word) > width and len(word) > 1 and len(lines) <= max_lines:
            fits = next(end for end in range(len(word) - 1, 0, -1) if end == 1 or typeface.length(word[:end]) <= width)
            lines.append(word[:fits])
            word = word[fits:]
        lines.append(word)
    if len(lines) > max_lines:
        lines, last = lines[: max_lines - 1], lines[max_lines - 1].rstrip(".,")
        while last and typeface.length(f"{last} …") > width:
            last = last[:-1].rstrip()
        lines.append(f"{last} …")
    return lines


def resized(pixels: np.ndarray, side: int) -> Image.Image:
    """Returns an image, uint8 [H, W, 3], whose longer side is `side`. A smaller one is enlarged without smoothing."""
    image = Image.fromarray(np.asarray(pixels, np.uint8))
    longer = max(image.size)
    width, height = (max(1, round(length * side / longer)) for length in image.size)
    return image.resize((width, height), Image.Resampling.NEAREST if longer < side else Image.Resampling.BOX)


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Sizes of a grid's text, in pixels.

    Attributes:
      caption, heading, title: heights of the letters.
      left: width of the captions to the left of the images; 0 if they stand above.
      above: height of the caption above a row.
      heading_height, title_height: heights of these lines.
      between: space between two blocks.
    """

    caption: int
    heading: int
    title: int
    left: int
    above: int
    heading_height: int
    title_height: int
    between: int


_LEFT = _Sizes(15, 13, 20, left=190, above=0, heading_height=24, title_height=34, between=0)
_ABOVE = _Sizes(22, 19, 34, left=0, above=38, heading_height=30, title_height=54, between=24)
_TITLE_LINES = 3


def image_grid(
    rows: Sequence[tuple[str, Sequence[np.ndarray]]],
    columns: Sequence[str] = (),
    *,
    title: str = "",
    cell_size: int = 128,
    blocks: int = 1,
    captions_above: bool = False,
) -> np.ndarray:
    """Draws a grid of captions and images, one caption per row.

    Args:
      rows: caption and images, uint8 [H, W, 3], of each row. All rows have the same number of images. If no row has a
        caption, no space is left for them.
      columns: a heading for each column of images. A heading that repeats is written once, over the first column.
      title: title over the grid, in up to three lines of its width.
      cell_size: side of a shown image, pixels. Small images are enlarged without smoothing.
      blocks: number of blocks of rows, placed side by side.
      captions_above: write captions in large letters above their rows, for a grid that is shown at half its size.
        Otherwise they stand to the left.

    Returns:
      uint8 [H', W', 3].

    Raises:
      ValueError: no row, or rows of different lengths.
    """
    if not rows or len({len(images) for _, images in rows}) != 1:
        raise ValueError("A grid needs at least one row, and the same number of images in each row.")
    gap, margin, line_height = 8, 16, 19
    sizes = _ABOVE if captions_above else _LEFT
    has_captions, per_row = any(caption for caption, _ in rows), len(rows[0][1])
    left_of_images, above_images = (sizes.left, sizes.above) if has_captions else (0, 0)
    images_width = per_row * (cell_size + gap) + gap
    caption_width, caption_lines = images_width - gap, 1
    if sizes.left:
        caption_width, caption_lines = sizes.left - 2 * gap, max(1, cell_size // line_height)
    body, small, big = Typeface(sizes.caption), Typeface(sizes.heading), Typeface(sizes.title)
    block_width, row_height = left_of_images + images_width, above_images + cell_size + gap
    lines = -(-len(rows) // blocks)
    width = 2 * margin + blocks * block_width + (blocks - 1) * sizes.between
    title_lines, title_step = wrap(title, big, width - 2 * margin, _TITLE_LINES), sizes.title * 5 // 4
    title_height = sizes.title_height + (len(title_lines) - 1) * title_step if title_lines else 0
    top = margin + title_height + (sizes.heading_height if columns else 0)
    sheet = Image.new("RGB", (width, top + lines * row_height + margin), PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, line in enumerate(title_lines):
        big.draw(pen, (margin, margin - 4 + number * title_step), line, INK)
    for block in range(blocks):
        left = margin + block * (block_width + sizes.between)
        shown = None
        for i, heading in enumerate(columns):
            if heading != shown:
                place = (left + left_of_images + i * (cell_size + gap), top + 2 - sizes.heading_height)
                small.draw(pen, place, heading, FAINT)
            shown = heading
    for i, (caption, images) in enumerate(rows):
        left, y = margin + (i // lines) * (block_width + sizes.between), top + (i % lines) * row_height
        for number, line in enumerate(wrap(caption, body, caption_width, caption_lines)):
            body.draw(pen, (left, y + 4 + number * line_height), line, INK)
        for j, pixels in enumerate(images):
            place = (left + left_of_images + j * (cell_size + gap), y + above_images)
            sheet.paste(resized(pixels, cell_size), place)
    return np.asarray(sheet)


def png(image: np.ndarray) -> bytes:
    """Encodes an image, uint8 [H, W, 3], as PNG."""
    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, format="PNG")
    return encoded.getvalue()


def save_png(path: epath.PathLike, image: np.ndarray) -> None:
    """Writes an image, uint8 [H, W, 3], as PNG to a local or remote path, atomically.

    Raises:
      UserError: the file cannot be written.
    """
    write_file(path, png(image))
