"""A report as one HTML file: headings, tables, images and code. The file loads nothing from outside and has no script.

    parts = [heading("Metrics"), table({"autoregressive": {...}, "maskgit": {...}}), image(grid, "captions")]
    write_file(path, page("Quickstart", parts))

Each function returns a piece of HTML and escapes the text that it is given.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dalle_jax.reporting.images import png
from dalle_jax.reporting.meanings import meaning

_SMALL = 128  # pixels; a smaller image is enlarged without smoothing
_STYLE = """
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: #202124; max-width: 74em; margin: 0 auto 4em; padding: 0 1.25em; }
h1 { font-size: 1.8em; line-height: 1.25; overflow-wrap: anywhere; } h2 { font-size: 1.3em; margin: 2em 0 .5em; }
h3 { font-size: 1.05em; margin: 1.5em 0 .25em; }
p { max-width: 46em; } p, pre, figcaption { overflow-wrap: anywhere; }
.wide { overflow-x: auto; } table { border-collapse: collapse; margin: .5em 0 1em; }
th, td { padding: .3em 1.2em .3em 0; text-align: left; vertical-align: top; border-bottom: 1px solid #e8eaed;
  font-weight: normal; }
td { font-variant-numeric: tabular-nums; overflow-wrap: break-word; } tr:first-child th { color: #5f6368; }
small { display: block; color: #5f6368; font-size: .82em; line-height: 1.35; max-width: 34em; }
small strong { font-weight: 600; color: #3c4043; }
figure { margin: 0; }
figcaption { color: #5f6368; font-size: .88em; }
img, svg { display: block; max-width: 100%; height: auto; } img.sharp { image-rendering: pixelated; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21em), 1fr)); gap: 1.5em; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 32em), 1fr)); gap: 1em; }
.plot svg { width: 100%; } .key span { margin-right: 1.2em; font-size: .88em; white-space: nowrap; }
.key em { display: inline-block; width: 1em; height: .25em; margin: 0 .4em .2em 0; }
.rows > section { border-top: 1px solid #e8eaed; padding: .8em 0; } .rows h3 { margin: 0 0 .5em; font-weight: 500; }
.images { display: flex; flex-wrap: wrap; gap: .8em; --side: 8em; }
.images > *, .images img { width: calc(var(--side) * var(--ratio, 1)); } .images img { box-shadow: 0 0 0 1px #dadce0; }
@media (max-width: 40em) {
  .images { gap: .5em; --side: 6.2em; } .images figcaption { font-size: .75em; }
  th, td { padding-right: .6em; } table { font-size: .85em; }
}
label { cursor: zoom-in; } label input { position: absolute; opacity: 0; }
input:focus-visible + img { outline: 3px solid #1a73e8; }
input:checked + img { position: fixed; inset: 0; width: 100%; height: 100%; max-width: none; object-fit: contain;
  background: #fffffff2; padding: 1em; z-index: 1; cursor: zoom-out; box-shadow: none; }
summary { font-size: 1.3em; margin-top: 1.5em; cursor: pointer; }
pre { background: #f8f9fa; padding: 1em; overflow-x: auto; font-size: 13px; border-radius: 6px; }
pre.code { overflow-wrap: normal; }
progress { width: 100%; height: .8em; }
"""


def page(title: str, parts: Sequence[str], refresh: int | None = None) -> str:
    """Joins pieces of HTML, in order, to the whole file.

    Args:
      title: title and first heading.
      parts: the pieces.
      refresh: seconds after which a browser reads the file again; None for never.
    """
    title = html.escape(title)
    again = f'<meta http-equiv="refresh" content="{refresh}">\n' if refresh else ""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n{again}'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def heading(text: str, level: int = 2) -> str:
    return f"<h{level}>{html.escape(text)}</h{level}>"


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def progress_bar(done: float, total: float) -> str:
    return f'<progress value="{done:g}" max="{max(total, 1):g}"></progress>'


def code(text: str) -> str:
    """Returns code to copy."""
    return f'<pre class="code">{html.escape(text)}</pre>'


def details(summary: str, text: str) -> str:
    """Returns preformatted text, for instance a configuration, folded under a summary that opens it."""
    return folded(summary, f"<pre>{html.escape(text)}</pre>")


def folded(summary: str, content: str) -> str:
    """Returns a piece of HTML that is folded under a summary that opens it."""
    return f"<details><summary>{html.escape(summary)}</summary>{content}</details>"


def side_by_side(parts: Sequence[str], wide: bool = False) -> str:
    """Returns pieces of HTML next to each other: two if they are `wide`, else as many as fit. "" without any."""
    return f'<div class="{"pairs" if wide else "plots"}">{"".join(parts)}</div>' if any(parts) else ""


def table(columns: Mapping[str, Mapping[str, Any]], names_down: bool = False, explain: bool = False) -> str:
    """Returns a table of metrics: a column for each name, and a row for each metric that any of them has.

    Args:
      columns: metrics by name. Nested metrics become rows "outer, inner".
      names_down: exchange rows and columns.
      explain: say below the name of each row which direction is better and what the metric measures.
    """
    flat = {name: _flatten(metrics) for name, metrics in columns.items()}
    names = list(dict.fromkeys(name for metrics in flat.values() for name in metrics))
    if names_down:
        flat, names, columns = {name: {of: flat[of].get(name, "") for of in flat} for name in names}, list(flat), names
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("", *columns))
    explained = _explanations(names) if explain else {}
    rows = [
        f"<tr><th>{html.escape(name)}{explained.get(name, '')}</th>"
        + "".join(f"<td>{html.escape(metrics.get(name, ''))}</td>" for metrics in flat.values())
        + "</tr>"
        for name in names
    ]
    return f'<div class="wide"><table>\n<tr>{head}</tr>\n' + "\n".join(rows) + "\n</table></div>"


def _explanations(names: Sequence[str]) -> dict[str, str]:
    """Returns the meaning of metrics as HTML. Of metrics with equal meanings the first one has it."""
    found, said = {}, set()
    for name in names:
        means = meaning(name)
        if means is not None and means not in said:
            said.add(means)
            direction = f"<strong>{means.direction_as_sentence()}</strong> " if means.direction else ""
            found[name] = f"<small>{direction}{html.escape(means.sentence)}</small>"
    return found


def image(pixels: np.ndarray | bytes, caption: str) -> str:
    """Embeds an image with a caption. A click enlarges it, another one closes it.

    Args:
      pixels: uint8 [H, W, 3], or the bytes of a PNG or JPEG file.
      caption: text below the image.
    """
    sharp, kind, ratio = ' class="sharp"', "png", ""
    if isinstance(pixels, bytes):
        sharp, kind = "", "jpeg" if pixels[:2] == b"\xff\xd8" else "png"
    else:
        height, width = pixels.shape[:2]
        sharp = sharp if max(height, width) <= _SMALL else ""
        ratio = f' style="--ratio:{width / height:.3g}"' if width != height else ""
    data = base64.b64encode(pixels if isinstance(pixels, bytes) else png(pixels)).decode()
    caption = html.escape(caption)
    return (
        f'<figure{ratio}><label><input type="checkbox" autocomplete="off" aria-label="enlarge" />'
        f'<img{sharp} src="data:image/{kind};base64,{data}" alt="{caption}"></label>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def gallery(rows: Sequence[tuple[str, Sequence[tuple[str, np.ndarray]]]]) -> str:
    """Returns rows of images that wrap on a narrow screen.

    Args:
      rows: the heading of each row, and its images, uint8 [H, W, 3], with their captions.
    """
    sections = [
        f"<section>{heading(head, 3) if head else ''}"
        f'<div class="images">{"".join(image(pixels, caption) for caption, pixels in images)}</div></section>'
        for head, images in rows
    ]
    return f'<div class="rows">{"".join(sections)}</div>'


def _flatten(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}, ")
        else:
            flat[prefix + str(name)] = f"{value:.4g}" if isinstance(value, (float, np.floating)) else str(value)
    return flat
