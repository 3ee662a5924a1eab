"""A contact sheet: groups of images with their captions below, on one page."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from dalle_jax.reporting.fonts import Typeface
from dalle_jax.reporting.images import FAINT, INK, PAPER, resized, wrap

_CELL, _GAP, _MARGIN = 128, 16, 20  # pixels
_CAPTION_SIZE, _CAPTION_LINE, _CAPTION_LINES = 13, 16, 3
_NOTE_LINE, _HEADING, _TITLE, _SUBTITLE = 16, 34, 34, 20


@dataclasses.dataclass(frozen=True)
class Shown:
    """One image of a sheet.

    Attributes:
      image: uint8 [H, W, 3].
      caption: text below it.
      note: a short line below the caption, in grey.
    """

    image: np.ndarray
    caption: str
    note: str = ""


def contact_sheet(
    groups: Sequence[tuple[str, Sequence[Shown]]], *, title: str = "", subtitle: str = "", columns: int = 8
) -> np.ndarray:
    """Draws groups of images with captions of at most three lines.

    Args:
      groups: heading and images of each group, at least one image in all. No space is left for texts that are all "".
      title: heading of the page; cut if it is wider than the page.
      subtitle: one line below it; cut in the same way.
      columns: images in a row.

    Returns:
      uint8 [H', W', 3].
    """
    groups = [(heading, shown) for heading, shown in groups if shown]
    has_text = any(each.caption or each.note for _, shown in groups for each in shown)
    row_height = _CELL + (4 + _CAPTION_LINES * _CAPTION_LINE + _NOTE_LINE if has_text else 0) + _GAP
    top = _MARGIN + (_TITLE if title else 0) + (_SUBTITLE if subtitle else 0)
    rows = [-(-len(shown) // columns) for _, shown in groups]
    headings = sum(_HEADING for heading, _ in groups if heading)
    width = 2 * _MARGIN + columns * (_CELL + _GAP) - _GAP
    sheet = Image.new("RGB", (width, top + headings + sum(rows) * row_height + _MARGIN), PAPER)
    pen = ImageDraw.Draw(sheet)
    _line(pen, (_MARGIN, _MARGIN - 4), title, 22, INK, width - 2 * _MARGIN)
    _line(pen, (_MARGIN, _MARGIN + _TITLE - 8), subtitle, 14, FAINT, width - 2 * _MARGIN)
    y = top
    for heading, shown in groups:
        _line(pen, (_MARGIN, y + 8), heading, 16, INK, width - 2 * _MARGIN)
        y += _HEADING if heading else 0
        for place, each in enumerate(shown):
            _cell(sheet, pen, _MARGIN + place % columns * (_CELL + _GAP), y + place // columns * row_height, each)
        y += -(-len(shown) // columns) * row_height
    return np.asarray(sheet)


def _cell(sheet: Image.Image, pen: ImageDraw.ImageDraw, left: int, top: int, shown: Shown) -> None:
    image = resized(shown.image, _CELL)
    sheet.paste(image, (left, top))
    edge = (left - 1, top - 1, left + image.width, top + image.height)
    pen.rectangle(edge, outline=(218, 220, 224))  # white images have an edge
    typeface = Typeface(_CAPTION_SIZE)
    lines = wrap(shown.caption, typeface, _CELL, _CAPTION_LINES)
    for number, line in enumerate(lines):
        typeface.draw(pen, (left, top + _CELL + 5 + number * _CAPTION_LINE), line, INK)
    _line(pen, (left, top + _CELL + 5 + len(lines) * _CAPTION_LINE), shown.note, 12, FAINT, _CELL)


def _line(
    pen: ImageDraw.ImageDraw, place: tuple[int, int], text: str, size: int, ink: tuple[int, int, int], width: int
) -> None:
    """Draws one line, cut to a width."""
    typeface = Typeface(size)
    for line in wrap(text, typeface, width, 1):
        typeface.draw(pen, place, line, ink)
