"""Takes the screenshots of the page in docs/demo.md, with Chromium and playwright (`pip install -e '.[test]'`).

    python -m dalle_jax.demo runs/quickstart/maskgit runs/quickstart/prior --port=7860
    python experiments/demo/screenshots.py --address=http://127.0.0.1:7860/ --output=experiments/results/demo

The runs are those of the quickstart, whose CLIP ranks the candidates (`--clip=runs/quickstart/clip`).
"""

from __future__ import annotations

import argparse
import io
import pathlib
import shutil
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

BEFORE, AFTER = "a large red circle above a small blue square", "a large red circle above a small green cross"
QUERY = "n=4&candidates=16"
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_MILLISECONDS = 180_000  # a drawing may wait for the compiler


def opened(browser: Any, address: str, query: str, **options: Any) -> Any:
    """Opens the page at a link in a new window, and waits until it is drawn."""
    page = browser.new_context(**options).new_page()
    page.set_default_timeout(_MILLISECONDS)
    page.goto(f"{address}?{query}")
    page.wait_for_selector("body[data-state=idle]")
    return page


def drawn(page: Any) -> None:
    """Draws, and waits for the end."""
    before = page.evaluate("Number(document.body.dataset.drawings ?? 0)")
    page.click("#draw")
    page.wait_for_selector(f'body[data-drawings="{before + 1}"][data-state=idle]')


def saved(page: Any, path: pathlib.Path, **options: Any) -> None:
    """Writes a screenshot as a small PNG."""
    Image.open(io.BytesIO(page.screenshot(**options))).convert("RGB").save(path, optimize=True)
    print(path, path.stat().st_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--address", default="http://127.0.0.1:7860/")
    parser.add_argument("--output", type=pathlib.Path, required=True)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    wide, narrow = {"width": 1400, "height": 900}, {"width": 400, "height": 860}
    caption = BEFORE.replace(" ", "+")
    with sync_playwright() as started:
        browser = started.chromium.launch(
            executable_path=next(filter(None, map(shutil.which, _BROWSERS))), args=["--no-sandbox"]
        )
        page = opened(browser, args.address, f"{QUERY}&caption={caption}", viewport=wide)
        saved(page, args.output / "draw.png")

        tile = page.locator('.panel[data-run="maskgit"] .tile').first
        tile.hover()
        tile.locator(".use").click()
        board = page.locator("#cells").bounding_box()
        at = lambda x, y: (board["x"] + x * board["width"], board["y"] + y * board["height"])
        page.evaluate("document.getElementById('brush').value = 3")
        page.mouse.move(*at(0.3, 0.75))
        page.mouse.down()
        page.mouse.move(*at(0.7, 0.75), steps=8)
        page.mouse.up()
        page.fill("#caption", AFTER)
        drawn(page)
        saved(page, args.output / "brush.png")

        page.fill("#caption", BEFORE)
        page.click("[data-method=outpaint]")
        for side, key in (("right", "ArrowRight"), ("left", "ArrowLeft")):
            for _ in range(4):
                page.locator(f'.handle[data-side="{side}"]').press(key)
        drawn(page)
        saved(page, args.output / "extend.png")

        dark = opened(browser, args.address, f"caption={caption}&candidates=16&n=8", viewport=wide, color_scheme="dark")
        saved(dark, args.output / "dark.png")

        phone = {"viewport": narrow, "device_scale_factor": 1.5, "is_mobile": True, "has_touch": True}
        page = opened(browser, args.address, f"{QUERY}&caption={caption}", **phone)
        saved(page, args.output / "phone.png", full_page=True)
        page.locator(".tile .use").first.tap()
        page.wait_for_timeout(1000)
        saved(page, args.output / "phone_edit.png")
        browser.close()


if __name__ == "__main__":
    main()
