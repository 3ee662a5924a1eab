"""Fonts for captions in any script: Pillow's own font, else an installed one that has the letters."""

from __future__ import annotations

import functools
import pathlib
import unicodedata
from collections.abc import Iterator

from PIL import ImageDraw, ImageFont

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
_IN_NO_FONT = "\U0010ffff"
_NOWHERE = "no font"
_TRIAL_SIZE = 24
_JOINED = ("Mn", "Mc", "Me", "Cf")  # marks and joiners: drawn with the letter before


class Typeface:
    """Measures and draws lines of text in one size. Each letter comes from the first font that has it."""

    def __init__(self, size: int):
        """Accepts the height of the letters in pixels."""
        self._size = size
        self._ascent = _load(None, size).getmetrics()[0]

    def length(self, text: str) -> float:
        """Returns the width of one line in pixels."""
        return sum(_load(file, self._size).getlength(run) for file, run in _runs(text))

    def draw(self, pen: ImageDraw.ImageDraw, place: tuple[float, float], text: str, ink: tuple[int, int, int]) -> None:
        """Draws one line whose upper left corner is `place`."""
        left, top = place
        for file, run in _runs(text):
            font = _load(file, self._size)
            pen.text((left, top + self._ascent), run, fill=ink, font=font, anchor="ls")
            left += font.getlength(run)


def _runs(text: str) -> Iterator[tuple[str | None, str]]:
    """Yields parts of a line with the file of their font; None is Pillow's own font.

    Blanks and marks stay in the part before them.
    """
    file, run = None, ""
    for letter in text:
        if letter.isspace() or unicodedata.category(letter) in _JOINED:
            own = file
        elif (own := _font_of(letter)) is _NOWHERE:
            own, letter = None, MISSING
        if own != file and run:
            yield file, run
            run = ""
        file, run = own, run + letter
    if run:
        yield file, run


@functools.lru_cache(maxsize=100_000)
def _font_of(letter: str) -> str | None:
    """Returns the font file that has a letter: None for Pillow's own font, `_NOWHERE` if no font has it."""
    if letter.isascii() or _has(letter, None):
        return None
    return next((file for file in _files() if _has(letter, file)), _NOWHERE)


def _has(letter: str, file: str | None) -> bool:
    """Whether a font draws a letter in another way than one that no font has."""
    drawn = _load(file, _TRIAL_SIZE).getmask(letter)
    return (drawn.size, bytes(drawn)) != _missing_glyph(file)


@functools.cache
def _missing_glyph(file: str | None) -> tuple[tuple[int, int], bytes]:
    drawn = _load(file, _TRIAL_SIZE).getmask(_IN_NO_FONT)
    return drawn.size, bytes(drawn)


@functools.lru_cache(maxsize=200)
def _load(file: str | None, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size) if file is None else ImageFont.truetype(file, size)


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
            _load(file, _TRIAL_SIZE)
            yield file
        except OSError:
            continue
