"""The report is one HTML file that loads nothing from outside."""

import base64
import html
import html.parser
import io
import re

import numpy as np
import pytest
from PIL import Image

from dalle_jax.reporting.html import details, heading, image, page, paragraph, table
from dalle_jax.reporting.line_chart import plot


class Outline(html.parser.HTMLParser):
    """Collects the rows of tables and the addresses that a page loads. Checks that every element is closed."""

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


def test_a_table_has_a_column_per_name():
    text = table({"a": {"x": 0.123456, "inner": {"y": 3}}, "b": {"inner": {"y": "4 < 5"}, "z": np.float32(0.5)}})
    assert Outline(text).rows == [
        ["", "a", "b"],
        ["x", "0.1235", ""],
        ["inner, y", "3", "4 < 5"],
        ["z", "", "0.5"],
    ]


def test_a_page_is_self_contained():
    """Images come back pixel for pixel, nothing is loaded from outside, and text is never markup."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 6, 3), np.uint8)
    points = {"one & two": [(1, 0.5), (2, 0.75), (16, 1.0)], "other": [(1, 0.25), (16, 0.5)]}
    parts = [
        heading("<b>"),
        paragraph("a <script>"),
        image(pixels, 'a "red" circle'),
        plot(points, "candidates", "accuracy", "more is better", powers=True),
        details("Configuration", "config.x = '<y>'"),
    ]
    text = page("All <of> it", parts)
    outline = Outline(text)
    (encoded,) = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded)))), pixels)
    assert all(source.startswith(("data:", "#")) for source in outline.sources)
    assert "<script" not in text and "<b>" not in text and "<of>" not in text
    assert text.count("<svg") == 1 and "candidates" in text and "one &amp; two" in text


@pytest.mark.parametrize("powers", [True, False])
def test_a_plot_is_deterministic(powers):
    one, two = (plot({"a": [(1, 1), (2, 3)]}, "x", "y", "", powers=powers) for _ in range(2))
    assert one == two
    assert one != plot({"a": [(1, 1), (2, 4)]}, "x", "y", "", powers=powers)


@pytest.mark.parametrize("name", ["runs/$x", "$a_b$", "_hidden", r"\frac{", "a_{b"])
def test_a_workdir_of_any_name_is_a_label(name):
    """Matplotlib would read some of them as mathematics, and leave others out of the legend."""
    points = {name: [(1, 0.5), (2, 0.75)], "other": [(1, 0.25), (2, 0.5)]}
    assert f">{html.escape(name, quote=False)}<" in plot(points, "x", "y", "a plot")
