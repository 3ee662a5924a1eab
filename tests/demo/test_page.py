"""The page in a browser, as a visitor uses it: type, draw, brush, extend, vary, save, and open a link again.

The server runs as a user starts it, with two runs of random weights.
"""

import base64
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import demo_runs
import numpy as np
import pytest
import quick_xla
from PIL import Image

from dalle_jax.demo import requests, server
from dalle_jax.jobs.generate import remake

pytest.importorskip("gradio", reason="the page needs gradio: pip install -e '.[demo]'")
playwright = pytest.importorskip("playwright.sync_api", reason="the browser is driven by playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ROOT = Path(__file__).parents[2]
CAPTION = "a red circle above a blue square"
SECONDS = 120  # a drawing waits for the compiler

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    runs = demo_runs.write(tmp_path_factory.mktemp("runs"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "XLA_FLAGS": quick_xla.flags(), "PYTHONPATH": str(ROOT)}  # one device
    command = [sys.executable, "-m", "dalle_jax.demo", *runs, f"--port={port}", "--queue=2"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = []
    while not lines or "The page is at" not in lines[-1]:
        lines.append(process.stdout.readline())
        assert lines[-1], "".join(lines)
    yield f"http://127.0.0.1:{port}/"
    process.terminate()
    process.communicate(timeout=30)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser, address):
    context = browser.new_context(viewport={"width": 1400, "height": 900}, reduced_motion="reduce")
    opened, faults = context.new_page(), []
    opened.set_default_timeout(1000 * SECONDS)
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    opened.goto(address)
    idle(opened)
    yield opened
    assert faults == []
    context.close()


def idle(page):
    page.wait_for_selector("body[data-state=idle]")


def draw(page, caption=CAPTION):
    page.fill("#caption", caption)
    before = finished(page)
    page.click("#draw")
    page.wait_for_selector(f'body[data-drawings="{before + 1}"][data-state=idle]')


def finished(page):
    """The number of drawings of this page that have ended."""
    return page.evaluate("Number(document.body.dataset.drawings ?? 0)")


def choose(page, *names):
    for box in page.query_selector_all("#runs label"):
        if box.query_selector("input").is_checked() != (box.inner_text().strip() in names):
            box.click()


def shown(page, run):
    """The images of a run, as data URLs."""
    images = page.query_selector_all(f'.panel[data-run="{run}"] .tile img')
    return [image.get_attribute("src") for image in images]


def pixels(url):
    assert url.startswith("data:image/png;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


def test_type_and_draw(page):
    assert page.input_value("#caption") == CAPTION, "an example is filled in"
    draw(page)
    maskgit, prior = shown(page, "maskgit"), shown(page, "prior")
    assert len(maskgit) == len(prior) == 4 and set(maskgit).isdisjoint(prior)
    assert {pixels(url).shape for url in maskgit + prior} == {(16, 16, 3)}
    meta = page.inner_text('.panel[data-run="prior"] .meta')
    assert re.search(r"4 images in [\d.]+ m?s", meta) and "16 steps" in meta


def test_images_appear_as_they_are_drawn(page):
    page.evaluate(
        """() => { window.seen = {}; new MutationObserver((all) => { for (const { target } of all)
        if (target.src) (seen[target.closest(".panel").dataset.run] ??= new Set()).add(target.src); })
        .observe(document.getElementById("panels"), { subtree: true, attributes: true, attributeFilter: ["src"] }); }"""
    )
    page.fill("#steps", "4")
    page.evaluate("document.getElementById('n').value = 1")
    draw(page)
    counts = page.evaluate("Object.fromEntries(Object.entries(seen).map(([run, all]) => [run, all.size]))")
    assert counts == {"maskgit": 4, "prior": 4}


def test_settings_reach_the_library(page):
    choose(page, "maskgit")
    draw(page)
    plain = shown(page, "maskgit")
    draw(page)
    assert shown(page, "maskgit") == plain, "the same seed"
    page.fill("#seed", "7")
    draw(page)
    assert set(shown(page, "maskgit")).isdisjoint(plain)
    page.fill("#seed", "0")
    page.fill("#top_k", "1")
    draw(page)
    assert shown(page, "maskgit") != plain
    page.fill("#negative", "a green star")
    draw(page)
    assert "guidance" in page.inner_text(".panel .error"), "the library's sentence"


def paint(page, start, end):
    """Draws a line with the brush, from and to shares of the board."""
    box = page.locator("#cells").bounding_box()
    at = lambda place: (box["x"] + place[0] * box["width"], box["y"] + place[1] * box["height"])
    page.mouse.move(*at(start))
    page.mouse.down()
    page.mouse.move(*at(end), steps=4)
    page.mouse.up()


def use(page, run="maskgit", place=0):
    tile = page.locator(f'.panel[data-run="{run}"] .tile').nth(place)
    tile.hover()
    tile.locator(".use").click()
    page.wait_for_selector("#chosen:not([hidden])")


def test_brush(page):
    choose(page, "maskgit")
    draw(page)
    before = pixels(shown(page, "maskgit")[1])
    use(page, place=1)
    page.evaluate("document.getElementById('brush').value = 1")
    paint(page, (0.1, 0.1), (0.1, 0.4))
    page.fill("#seed", "3")
    draw(page)
    after = [pixels(url) for url in shown(page, "maskgit")]
    changed = np.any([image != before for image in after], axis=(0, 3))
    assert changed[:12, :8].any() and not changed[12:].any() and not changed[:, 8:].any(), (
        "the cells and their neighbours"
    )


def test_nothing_marked(page):
    choose(page, "maskgit")
    draw(page)
    images = shown(page, "maskgit")
    use(page)
    page.click("#draw")
    page.wait_for_selector("#alert:not([hidden])")
    assert "brush" in page.inner_text("#alert") and shown(page, "maskgit") == images, "the images stay"


def test_an_error_is_no_drawing(page):
    choose(page, "maskgit")
    draw(page, "")
    assert "empty" in page.inner_text(".panel .error") and page.inner_text("#status") == ""


def test_guidance_schedule(page):
    choose(page, "maskgit")
    page.evaluate("Object.assign(document.getElementById('guidance'), { max: 100, value: 100 })")
    draw(page)
    plain = shown(page, "maskgit")
    page.fill("#guidance_schedule", "pow1000")
    draw(page)
    images, link = shown(page, "maskgit"), page.url
    assert images != plain and "guidance_schedule=pow1000" in link
    page.goto("about:blank")
    page.goto(link)
    page.wait_for_selector(".panel.done")
    idle(page)
    assert shown(page, "maskgit") == images and page.input_value("#guidance_schedule") == "pow1000"
    page.fill("#guidance_schedule", "quadratic")
    draw(page)
    assert "quadratic" in page.inner_text(".panel .error"), "the library's sentence"


def test_extend(page):
    choose(page, "maskgit")
    draw(page)
    before = pixels(shown(page, "maskgit")[0])
    use(page)
    page.click("[data-method=outpaint]")
    handle = page.locator('.handle[data-side="right"]')
    box = handle.bounding_box()
    cell = page.locator("#input").bounding_box()["width"] / 4
    page.mouse.move(box["x"] + 13, box["y"] + 13)
    page.mouse.down()
    page.mouse.move(box["x"] + 13 + 1.1 * cell, box["y"] + 13, steps=3)
    page.mouse.up()
    page.locator('.handle[data-side="top"]').press("ArrowUp")
    draw(page)
    after = pixels(shown(page, "maskgit")[0])
    assert after.shape == (20, 20, 3)
    np.testing.assert_array_equal(after[4:, :16], before)


def test_vary_and_chain(page, address):
    choose(page, "maskgit")
    draw(page)
    use(page, place=2)
    page.click("[data-method=vary]")
    page.evaluate("document.getElementById('strength').value = 0.5")
    draw(page)
    use(page, place=1)
    page.evaluate("document.getElementById('strength').value = 0.25")
    draw(page, "a green star")
    images, link = shown(page, "maskgit"), page.url
    assert link.count("step=") == 2
    page.goto("about:blank")
    page.goto(link)
    page.wait_for_selector(".panel.done")
    idle(page)
    assert shown(page, "maskgit") == images
    assert page.input_value("#caption") == "a green star" and page.input_value("#strength") == "0.25"


def test_a_link_reproduces_the_page(page):
    page.fill("#seed", "11")
    page.fill("#top_k", "9")
    page.evaluate("document.getElementById('n').value = 3")
    page.evaluate("document.getElementById('temperature').value = 0.6")
    choose(page, "prior")
    draw(page, "a green star & a <b>blue</b> square?")
    images, link = shown(page, "prior"), page.url
    page.goto("about:blank")
    page.goto(link)
    page.wait_for_selector(".panel.done")
    idle(page)
    assert shown(page, "prior") == images and len(images) == 3
    assert page.input_value("#seed") == "11" and page.input_value("#temperature") == "0.6"


def test_a_brushed_link(page):
    choose(page, "maskgit")
    draw(page)
    use(page)
    paint(page, (0.6, 0.6), (0.9, 0.9))
    draw(page, "a green star")
    images, link = shown(page, "maskgit"), page.url
    page.goto("about:blank")
    page.goto(link)
    page.wait_for_selector(".panel.done")
    idle(page)
    assert shown(page, "maskgit") == images


def test_saved_images_are_drawn_again(page, tmp_path):
    choose(page, "maskgit")
    draw(page)
    use(page)
    paint(page, (0.1, 0.1), (0.3, 0.1))
    draw(page, "a green star")
    tile = page.locator(".tile").nth(3)
    tile.hover()
    with page.expect_download() as download:
        tile.locator(".save").click()
    assert download.value.suggested_filename == "a-green-star-seed0-3.zip"
    zipfile.ZipFile(download.value.path()).extractall(tmp_path)
    again = remake(str(tmp_path / "manifest.json"), "0000-000.png")
    np.testing.assert_array_equal(again, pixels(shown(page, "maskgit")[3]))


def test_uploads(page, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)).save(tmp_path / "photo.png")
    page.set_input_files("#upload", str(tmp_path / "photo.png"))
    page.wait_for_selector("#chosen:not([hidden])")
    choose(page, "prior")
    draw(page)
    assert len(shown(page, "prior")) == 4, "the top rows are kept"
    assert "upload=1" in page.url
    (tmp_path / "large.png").write_bytes(b"\x89PNG" + bytes(requests.MOST_BYTES))
    page.set_input_files("#upload", str(tmp_path / "large.png"))
    page.wait_for_selector("#alert:not([hidden])")
    assert "8 MiB" in page.inner_text("#alert")


def test_text_is_never_html(page):
    evil = '<img src=x onerror="window.broken=1"><script>window.broken=1</script>'
    choose(page, "maskgit")
    draw(page, evil)
    page.fill("#negative", evil)
    draw(page, evil)
    assert page.evaluate("window.broken") is None
    assert page.query_selector("#panels img[src=x], #panels script, .error img") is None
    assert "<img src=x" in page.inner_text(".panel .error"), "the caption is shown as it was typed"


def test_a_phone(browser, address):
    context = browser.new_context(viewport={"width": 400, "height": 800}, has_touch=True, reduced_motion="reduce")
    page = context.new_page()
    page.set_default_timeout(1000 * SECONDS)
    page.goto(address)
    idle(page)
    draw(page)
    page.locator(".tile .use").first.tap()
    page.wait_for_selector("#chosen:not([hidden])")
    for method in ("outpaint", "inpaint"):
        page.click(f"[data-method={method}]")
        assert page.evaluate("document.documentElement.scrollWidth") <= 400, method
    board = page.locator("#board").bounding_box()
    assert board["x"] >= 0 and board["x"] + board["width"] <= 400
    tap = page.locator("#cells")
    tap.tap(position={"x": 20, "y": 20})
    draw(page)
    assert len(shown(page, "maskgit")) == 4
    context.close()


# -- the server -------------------------------------------------------------------------------------------------------


def status(asked):
    """The HTTP status of an answer. The connection is closed."""
    try:
        with urllib.request.urlopen(asked, timeout=SECONDS) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def post(address, name, body):
    return urllib.request.Request(f"{address}gradio_api/call/{name}", body, {"Content-Type": "application/json"})


def test_scripts_come_from_the_server_alone(address):
    with urllib.request.urlopen(address) as answer:
        policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy and "unsafe" not in policy
    for name in ("..%2fserver.py", "server.py", "..", "%2e%2e"):
        assert status(f"{address}page/{name}") == 404


def test_a_body_that_is_too_large(address):
    try:
        assert status(post(address, "draw", b"x" * (server.MOST_BYTES + 1))) == 413
    except (urllib.error.URLError, ConnectionError):
        pass  # the server may close the connection before it has read all


def test_the_queue_is_bounded(address):
    """One drawing runs, two wait, and another one gets an error."""
    request = {"caption": CAPTION, "runs": ["maskgit"], "n": 16, "candidates": 0, "sampling": {"steps": 16}}
    body = json.dumps({"data": [request]}).encode()
    codes = [status(post(address, "draw", body)) for _ in range(12)]
    assert set(codes) == {200, 503}
    time.sleep(1)
