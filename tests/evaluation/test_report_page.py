"""The report is one HTML file that loads nothing from outside."""

import base64
import dataclasses
import html
import html.parser
import io
import re
import shlex
import sys
import types

import numpy as np
import pytest
from PIL import Image

from dalle_jax.evaluation.measure import Measured
from dalle_jax.evaluation.page import evaluation
from dalle_jax.evaluation.showcase import Showcase
from dalle_jax.priors.sampling import SamplingOptions
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
        if tag not in ("meta", "img", "br", "input"):
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


def test_an_image_enlarges_without_a_script():
    text = image(np.zeros((8, 8, 3), np.uint8), "a circle")
    assert 'type="checkbox"' in text and 'class="sharp"' in text, "small images are enlarged without smoothing"
    assert 'class="sharp"' not in image(np.zeros((200, 8, 3), np.uint8), "a circle")
    assert "data:image/jpeg" in image(b"\xff\xd8 and so on", "a photo")


def test_rows_explain_their_metrics():
    text = table({"a": {"psnr": 20.0, "kl_nats": 1.0, "own": 2.0}}, explain=True)
    assert "<strong>Higher is better.</strong> Likeness" in text and text.count("<small>") == 2
    assert "<small>" not in table({"a": {"psnr": 20.0}})


# -- the report of an evaluation ----------------------------------------------------------------------------------

SAMPLING = dataclasses.asdict(SamplingOptions(top_k=3))


NOISE = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)


def report(columns=("real", "maskgit", "best of 16")):
    protocol = {
        "captions": "2, first", "data": "shapes", "device": "cpu", "seed": 5, "sampling": {"maskgit": SAMPLING},
    }  # fmt: skip
    measured = Measured(
        {"maskgit": {"fid": 1.0}, "protocol": protocol},
        [(name, NOISE) for name in columns],
        {"maskgit": "runs/it's"},
        {"maskgit": Showcase([("a star", [("step 1 of 2", NOISE[0])])], [("a star", [("real", NOISE[1])])])},
    )
    losses = {"dvae": [], "maskgit": [{"step": 1, "train/loss": 2.0}, {"step": 2, "train/loss": 1.0, "eval/loss": 1.5}]}
    return evaluation("A title", measured, ("a red circle", "a 'star'"), "key: value", losses)


def test_a_report_shows_images_unmasking_edits_and_losses():
    text = report()
    Outline(text)
    assert text.count("data:image/png") == 2 * 3 + 2
    assert "maskgit, best of 16" in text and "step 1 of 2" in text and "a red circle</h3>" in text
    assert text.count("<svg") == 1 and "maskgit: loss" in text, "the dVAE logged nothing"


def test_a_report_of_classes_does_not_speak_of_real_images_in_its_rows():
    of_captions, of_classes = report(), report(columns=("maskgit",))
    for word in ("The first captions", "reconstruction", "sample per caption"):
        assert word in of_captions and word not in of_classes
    assert "The first classes" in of_classes


def test_settings_that_are_not_used_are_left_out():
    rows = dict(row for row in Outline(report()).rows if len(row) == 2)
    assert rows["sampling, maskgit, top_k"] == "3"
    assert not [name for name, value in rows.items() if value == "None"]


def test_the_code_of_a_report_is_the_one_that_drew():
    """Only the parameters that differ from the defaults, and the same workdir, caption and seed."""
    shown = [html.unescape(part) for part in re.findall(r'<pre class="code">(.*?)</pre>', report(), re.DOTALL)]
    program, command = shown
    called = []
    model = types.SimpleNamespace(generate=lambda *args, **kwargs: called.append((args, kwargs)))
    library = types.SimpleNamespace(
        TextToImage=types.SimpleNamespace(load=lambda workdir: called.append(workdir) or model),
        save=lambda *args: called.append("save"),
        show=lambda images: called.append("show"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "dalle_jax", library)
        exec(program, {})
    assert called == ["runs/it's", (("a red circle",), {"n": 8, "seed": 5, "top_k": 3}), "show", "save"]
    flags = shlex.split(command)[3:]
    assert flags == [
        "--config=generate", "--config.model_workdir=runs/it's", "--config.prompts=a red circle", "--config.n=8",
        "--config.seed=5", "--config.sampling.top_k=3",
    ]  # fmt: skip


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
