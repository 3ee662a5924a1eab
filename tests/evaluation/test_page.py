"""The report as a file of its own: everything in it, nothing outside of it."""

import base64
import html.parser
import io
import re

import numpy as np
import pytest
from PIL import Image

from dalle_jax.reporting.html import heading, page, paragraph, picture, plot, preformatted, table


class Outline(html.parser.HTMLParser):
    """Rows of tables, addresses of what a page loads, and whether every element is closed."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.sources, self._open = [], [], []
        self.feed(text)
        assert not self._open, self._open

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in ("meta", "img", "br"):
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def test_figures_stand_side_by_side():
    text = table({"a": {"x": 0.123456, "inner": {"y": 3}}, "b": {"inner": {"y": "4 < 5"}, "z": np.float32(0.5)}})
    assert Outline(text).rows == [
        ["", "a", "b"],
        ["x", "0.1235", ""],
        ["inner, y", "3", "4 < 5"],
        ["z", "", "0.5"],
    ]


def test_a_page_needs_nothing_else():
    """Pictures come back pixel for pixel; what is loaded lies inside; no text is taken for markup."""
    image = np.random.default_rng(0).integers(0, 256, (8, 6, 3), np.uint8)
    points = {"one & two": [(1, 0.5), (2, 0.75), (16, 1.0)], "other": [(1, 0.25), (16, 0.5)]}
    parts = [
        heading("<b>"),
        paragraph("a <script>"),
        picture(image, 'a "red" circle'),
        plot(points, "candidates", "accuracy", "more is better", powers=True),
        preformatted("config.x = '<y>'"),
    ]
    text = page("All <of> it", parts)
    outline = Outline(text)
    (encoded,) = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded)))), image)
    assert all(source.startswith(("data:", "#")) for source in outline.sources)
    assert "<script" not in text and "<b>" not in text and "<of>" not in text
    assert text.count("<svg") == 1 and "candidates" in text and "one &amp; two" in text


@pytest.mark.parametrize("powers", [True, False])
def test_a_plot_is_the_same_every_time(powers):
    one, two = (plot({"a": [(1, 1), (2, 3)]}, "x", "y", "", powers=powers) for _ in range(2))
    assert one == two
    assert one != plot({"a": [(1, 1), (2, 4)]}, "x", "y", "", powers=powers)
