"""Contact sheets: every image is on the page, captions stay in their cells, and letters have a font."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from dalle_jax.reporting import fonts
from dalle_jax.reporting.contact_sheet import Shown, contact_sheet
from dalle_jax.reporting.fonts import Typeface
from dalle_jax.reporting.images import wrap

LONG = "a caption of many words that does not fit on three lines below an image of this size " * 4
CAPTIONS = ["a cat", LONG, "x" * 300, "猫" * 90, "Рыжий кот " * 20, "", "\n\t two \n", "and\x00nul"]


def draw(caption, image=77, columns=8, note=""):
    shown = [Shown(np.full((8, 8, 3), image, np.uint8), "a cat")] * 9
    shown[1] = Shown(shown[0].image, caption, note)
    return contact_sheet([("Training", shown)], title="T", columns=columns)


def test_every_image_is_on_the_page():
    noise = np.random.default_rng(0).integers(0, 256, (11, 8, 8, 3), np.uint8)
    groups = [("A", [Shown(each, "x") for each in noise[:9]]), ("none", []), ("B", [Shown(e, "y") for e in noise[9:]])]
    sheet = contact_sheet(groups, title="T", subtitle="s", columns=4)
    corners = {tuple(pixel) for pixel in sheet.reshape(-1, 3).tolist()}
    assert all(tuple(each[0, 0].tolist()) in corners and tuple(each[7, 7].tolist()) in corners for each in noise)


@pytest.mark.parametrize("caption", CAPTIONS)
def test_a_caption_stays_in_its_cell(caption):
    changed = (draw(caption, note="a note " * 30) != draw("a cat")).any(-1)
    rows, columns = np.where(changed)
    assert not changed.any() or (columns.min() >= 162 and columns.max() < 164 + 128 + 4)
    assert not changed.any() or rows.max() < 88 + 128 + 4 + 5 * 16


def test_long_headings_are_cut():
    shown = [Shown(np.zeros((8, 8, 3), np.uint8), "x")]
    narrow = contact_sheet([("h" * 900, shown)], title="t " * 900, subtitle="s " * 900, columns=2)
    assert (narrow[:, -16:] == 255).all()


@pytest.mark.parametrize("caption", CAPTIONS)
@pytest.mark.parametrize("max_lines", [1, 3, 50])
def test_wrapped_lines_fit(caption, max_lines):
    typeface = Typeface(13)
    lines = wrap(caption, typeface, 128, max_lines)
    assert len(lines) <= max_lines and all(typeface.length(line) <= 128 for line in lines)
    whole = "".join(caption.split())
    if max_lines == 50:
        assert "".join("".join(lines).split()) == whole
    elif len(whole) > 40:
        assert lines[-1].endswith("…")


def drawn(text):
    image = Image.new("L", (400, 40))
    Typeface(20).draw(ImageDraw.Draw(image), (5, 5), text, 255)
    return np.asarray(image)


def test_letters_come_from_a_font_that_has_them(monkeypatch):
    """A letter that no font has is drawn as a question mark, never as an empty box."""
    assert np.array_equal(drawn("\U00050000?"), drawn("??"))
    monkeypatch.setattr(fonts, "_files", lambda: ())
    fonts._font_of.cache_clear()
    try:
        assert np.array_equal(drawn("猫 cat"), drawn("? cat"))
    finally:
        fonts._font_of.cache_clear()


def test_a_mixed_line_is_as_wide_as_its_parts():
    typeface = Typeface(20)
    assert typeface.length("cat 猫 dog") == pytest.approx(sum(map(typeface.length, ("cat ", "猫 ", "dog"))), abs=1)
    assert drawn("cat 猫").any()
