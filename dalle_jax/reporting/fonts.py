"""Fonts for captions in any script: Pillow's own font, else an installed one that has the letters."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Iterator

from PIL import ImageFont

MISSING = "?"  # drawn for a letter that no installed font has

_FOLDERS = (
    "/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts",
    "/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts", "C:/Windows/Fonts",
)  # fmt: skip
# Beginnings of file names, in the order of trial. Regular styles only.
_FAMILIES = (
    "dejavusans", "notosans", "freesans", "liberationsans", "arialunicode", "arial", "segoeui", "notosanscjk",
    "wqy", "droidsansfallback", "msyh", "yugoth", "malgun", "pingfang", "hiragino", "nirmala", "unifont", "freeserif",
)  # fmt: skip
_STYLES = ("bold", "oblique", "italic", "light", "condensed", "narrow", "thin", "black", "medium", "mono", "medi")
_NONE = "\U0010ffff"  # no font has a glyph for it


def font_for(text: str, size: int) -> tuple[ImageFont.FreeTypeFont, str]:
    """Returns a font with the letters of a text, and the text to draw with it.

    Args:
      text: what to draw.
      size: height in pixels.

    Returns:
      The font that has the most of its letters, and the text with "?" for those that it lacks.
    """
    own = ImageFont.load_default(size)
    letters = {letter for letter in text if not letter.isspace()}
    best, lacking = own, _lacking(letters, None, size)
    for file in _files() if lacking else ():
        if len(missing := _lacking(letters, file, size)) < len(lacking):
            best, lacking = _load(file, size), missing
        if not lacking:
            break
    return best, "".join(MISSING if letter in lacking else letter for letter in text)


def _lacking(letters: set[str], file: str | None, size: int) -> set[str]:
    return {letter for letter in letters if not _has(letter, file)}


@functools.lru_cache(maxsize=100_000)
def _has(letter: str, file: str | None) -> bool:
    """Whether a font draws a letter in another way than one that no font has."""
    if letter.isascii():
        return True
    font = ImageFont.load_default(24) if file is None else _load(file, 24)
    drawn = font.getmask(letter)
    return (drawn.size, bytes(drawn)) != _missing_glyph(file)


@functools.cache
def _missing_glyph(file: str | None) -> tuple[tuple[int, int], bytes]:
    drawn = (ImageFont.load_default(24) if file is None else _load(file, 24)).getmask(_NONE)
    return drawn.size, bytes(drawn)


@functools.cache
def _load(file: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size)


@functools.cache
def _files() -> tuple[str, ...]:
    """Returns the installed font files of the known families that Pillow can open."""
    found = []
    for folder in _FOLDERS:
        for path in sorted(pathlib.Path(folder).expanduser().rglob("*.[toTO][tT][fFcC]")):
            name = path.stem.lower().replace("-", "").replace(" ", "").replace("regular", "")
            families = [place for place, family in enumerate(_FAMILIES) if name.startswith(family)]
            if families and not any(style in name for style in _STYLES):
                found.append((max(families), len(name), str(path)))
    return tuple(_readable(file for _, _, file in sorted(found)))


def _readable(files: Iterator[str]) -> Iterator[str]:
    for file in files:
        try:
            _load(file, 24)
            yield file
        except OSError:
            continue
