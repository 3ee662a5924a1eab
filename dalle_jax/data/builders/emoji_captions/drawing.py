"""Draws emoji with a colour bitmap font.

The font's scale and position are kept, so a small blue diamond stays smaller than a large one. Transparent parts become
white.

    H, W image size
"""

from __future__ import annotations

import pathlib

import numpy as np
import PIL.features
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from dalle_jax.errors import DataError

PACKAGE = "fonts-noto-color-emoji"
_FILE = "NotoColorEmoji.ttf"
_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts")
_BITMAP_SIZE = 109  # the one size at which the font holds bitmaps
_SIDE = 128  # pixels: the largest extent of such a bitmap


def find_font(path: str | None = None) -> pathlib.Path:
    """Finds the font.

    Args:
      path: path of the font's file; None searches the usual folders.

    Returns:
      The path of the font's file.

    Raises:
      DataError: if there is no such file.
    """
    if path is not None:
        found = [pathlib.Path(path).expanduser()]
    else:
        folders = [pathlib.Path(folder).expanduser() for folder in _FOLDERS]
        found = [font for folder in folders for font in sorted(folder.rglob(_FILE))]
    if not found or not found[0].is_file():
        where = str(path) if path is not None else f"{_FILE} under {', '.join(_FOLDERS)}"
        raise DataError(
            f"There is no emoji font at {where}. Install one (on Debian and Ubuntu: apt install {PACKAGE}) "
            "or set font to the path of its file."
        )
    return found[0]


class EmojiFont:
    """A colour bitmap font that draws one emoji at a time.

    Args:
      path: path of the font's file.

    Raises:
      DataError: if Pillow cannot compose emoji or cannot use the font.
    """

    def __init__(self, path: pathlib.Path):
        if not PIL.features.check("raqm"):
            raise DataError(
                "This Pillow was built without raqm, so it cannot compose emoji of several characters. "
                "Install Pillow's own wheel (pip install --force-reinstall pillow)."
            )
        try:
            self._font = PIL.ImageFont.truetype(path, _BITMAP_SIZE, layout_engine=PIL.ImageFont.Layout.RAQM)
        except OSError as error:
            raise DataError(
                f"{path} is not a font with bitmaps of {_BITMAP_SIZE} pixels ({error}); expected {_FILE} "
                f"as in the package {PACKAGE}."
            ) from error
        self._advance = self._font.getlength("\U0001f600")

    def draw(self, sequence: str) -> PIL.Image.Image | None:
        """Draws one emoji.

        Args:
          sequence: its characters.

        Returns:
          RGB image of 128 × 128, or None if the font has no single drawing for the sequence.
        """
        if self._font.getlength(sequence) != self._advance:  # several glyphs: a woman, then a fire engine
            return None
        left, top, right, bottom = self._font.getbbox(sequence)
        canvas = PIL.Image.new("RGBA", (_SIDE, _SIDE))
        corner = ((_SIDE - left - right) // 2, (_SIDE - top - bottom) // 2)
        PIL.ImageDraw.Draw(canvas).text(corner, sequence, font=self._font, embedded_color=True)
        if canvas.getchannel("A").getbbox() is None:  # the empty glyph of unknown characters
            return None
        return PIL.Image.alpha_composite(PIL.Image.new("RGBA", canvas.size, "white"), canvas).convert("RGB")


def shrink(drawing: PIL.Image.Image, image_size: int) -> np.ndarray:
    """Averages a drawing down to the requested size.

    Args:
      drawing: RGB.
      image_size: H and W.

    Returns:
      uint8 [H, W, 3].
    """
    return np.asarray(drawing.resize((image_size, image_size), PIL.Image.Resampling.BOX))
