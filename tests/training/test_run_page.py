"""`index.html` of a training: written at each evaluation and at the end, from what the workdir holds."""

import base64
import html
import io
import json
import pathlib
import re

import numpy as np
import pytest
from PIL import Image
from tiny_job import tiny_config, tiny_job

from dalle_jax.reporting.images import png
from dalle_jax.training import run_page
from dalle_jax.training.loop import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished training, and its page at each time it was written."""
    workdir, pages = tmp_path_factory.mktemp("run"), []
    write = run_page.RunPage.write

    def watched(self, step, said=""):
        write(self, step, said)
        pages.append((workdir / "index.html").read_text())

    config = tiny_config(cadence__preview=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_page.RunPage, "write", watched)
        train(config, str(workdir), tiny_job(config))
    return workdir, pages


def test_the_page_follows_the_training(trained):
    workdir, pages = trained
    assert len(pages) == 3, "steps 5 and 10, and the end"
    assert "Step 5 of 10 at " in pages[0] and "left" in pages[0] and 'http-equiv="refresh"' in pages[0]
    assert "Finished at step 10 of 10" in pages[-1] and 'http-equiv="refresh"' not in pages[-1]
    assert re.findall(r'<progress value="(\d+)" max="(\d+)"', "".join(pages)) == [
        ("5", "10"),
        ("10", "10"),
        ("10", "10"),
    ]
    assert "tiny net" in pages[0] and f"use {workdir}" in pages[-1], "the next steps"


def test_a_command_in_the_summary_can_be_copied():
    command = "python -m dalle_jax.main --config.prompts='a|b'"
    shown = "".join(run_page._said(f"draw captions: {command}"))
    assert "draw captions:" in shown and f'<pre class="code">{html.escape(command)}</pre>' in shown
    assert run_page._said("a line") == ["<p>a line</p>"]


def test_curves_and_metrics(trained):
    _, pages = trained
    assert pages[-1].count("<svg") == 2, "the loss and the error; the step size never changes"
    assert "<td>" in pages[-1] and "step 10" in pages[-1] and "step 5" in pages[-1]
    assert "skipped" not in pages[-1].partition("Configuration")[0], "a count that stays 0 is no curve"


def test_previews_over_time(trained):
    _, pages = trained
    assert pages[0].count(">step 5</figcaption>") == 1 and ">step 10</figcaption>" not in pages[0]
    assert pages[-1].index(">step 10</figcaption>") < pages[-1].index(">step 5</figcaption>"), "the latest first"


def test_nothing_is_loaded_from_outside(trained):
    _, pages = trained
    assert "<script" not in pages[-1]
    sources = re.findall(r'(?:src|href)="([^"]*)"', pages[-1])
    assert sources and all(source.startswith("data:image/") for source in sources)


def test_the_data(trained):
    text = trained[1][-1].partition("<h2>Data</h2>")[2]
    assert "left out/unreadable" in text and "<td>2</td>" in text


def test_a_resumed_run_shows_all_of_it(tmp_path):
    """The survey of the data job is shown, and a damaged one stops nothing."""
    config = tiny_config(steps=5)
    train(config, str(tmp_path), tiny_job(config))
    survey = {"source": "folder", "path": "<images>", "captions": {"first": ["a cat", "a dog"]}}
    (tmp_path / "data.json").write_text(json.dumps(survey))
    (tmp_path / "samples" / "data.png").write_bytes(png(np.zeros((4, 4, 3), np.uint8)))
    longer = tiny_config(steps=10)
    train(longer, str(tmp_path), tiny_job(longer))
    page = (tmp_path / "index.html").read_text()
    assert "step 5" in page and "step 10" in page and "a cat · a dog" in page and "folder &lt;images&gt;" in page
    assert "Training examples" in page
    (tmp_path / "data.json").write_text("{")
    longest = tiny_config(steps=15)
    train(longest, str(tmp_path), tiny_job(longest))
    assert "a cat" not in (tmp_path / "index.html").read_text()


def test_few_previews_are_embedded_and_large_ones_are_made_smaller(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (300, 2000, 3), np.uint8)
    files = {}
    for step in range(1, 21):
        files[step] = tmp_path / f"preview_{step:07d}.png"
        files[step].write_bytes(png(noise[:4, :4]) if step < 20 else png(noise))
    files[1].write_bytes(b"damaged")
    found = dict(run_page._previews(files))
    assert list(found) == [1, 5, 9, 12, 16, 20]
    assert found[5] == files[5].read_bytes()
    with Image.open(io.BytesIO(found[20])) as shown:
        assert (shown.format, shown.width) == ("JPEG", 1200)
    files[5].unlink()
    files[20].write_bytes(b"x" * 300_000)
    assert list(dict(run_page._previews(files))) == [1, 9, 12, 16], "unreadable files are left out"


def test_the_page_embeds_the_previews(trained):
    workdir, pages = trained
    encoded = re.findall(r'src="data:image/png;base64,([^"]+)"', pages[-1])
    shown = [Image.open(io.BytesIO(base64.b64decode(each))).size for each in encoded]
    assert shown.count((6, 4)) == len(list((pathlib.Path(workdir) / "samples").glob("preview_*.png"))) == 2
