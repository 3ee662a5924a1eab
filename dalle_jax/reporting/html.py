"""A report as one HTML file: headings, tables, images and plots, with nothing outside of it.

    parts = [heading("Metrics"), table({"autoregressive": {...}, "maskgit": {...}}), picture(grid, "captions")]
    path.write_text(page("Quickstart", parts))

Each function returns a piece of HTML and escapes whatever text it is given.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #202124; max-width: 70em; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.7em; } h2 { font-size: 1.25em; margin-top: 2em; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { padding: .25em .9em .25em 0; text-align: left; border-bottom: 1px solid #e8eaed; font-weight: normal; }
th { color: #5f6368; } td { font-variant-numeric: tabular-nums; }
figure { margin: 1em 0; } .plots { display: flex; flex-wrap: wrap; } .plots figure { flex: 1 1 22em; max-width: 30em; }
 figcaption { color: #5f6368; } img, svg { max-width: 100%; height: auto; }
pre { background: #f8f9fa; padding: 1em; overflow-x: auto; font-size: 13px; }
"""


def page(title: str, parts: Sequence[str]) -> str:
    """The whole file, from pieces of HTML in order."""
    title = html.escape(title)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def heading(text: str) -> str:
    return f"<h2>{html.escape(text)}</h2>"


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def preformatted(text: str) -> str:
    """Text as it stands, a configuration for instance."""
    return f"<pre>{html.escape(text)}</pre>"


def table(columns: Mapping[str, Mapping[str, Any]], names_down: bool = False) -> str:
    """Figures side by side: a column for each name, a row for each figure that any of them has.

    Args:
      columns: by name; nested figures become rows "outer, inner".
      names_down: the other way round, a row for each name.
    """
    flat = {name: _flatten(figures) for name, figures in columns.items()}
    names = list(dict.fromkeys(name for figures in flat.values() for name in figures))
    if names_down:
        flat, names, columns = {name: {of: flat[of].get(name, "") for of in flat} for name in names}, list(flat), names
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("", *columns))
    rows = [
        f"<tr><th>{html.escape(name)}</th>"
        + "".join(f"<td>{html.escape(figures.get(name, ''))}</td>" for figures in flat.values())
        + "</tr>"
        for name in names
    ]
    return f"<table>\n<tr>{head}</tr>\n" + "\n".join(rows) + "\n</table>"


def picture(image: np.ndarray, caption: str) -> str:
    """A picture, uint8 [H, W, 3], inside the file."""
    png = io.BytesIO()
    Image.fromarray(image).save(png, format="PNG")
    data = base64.b64encode(png.getvalue()).decode()
    caption = html.escape(caption)
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'
    )


def plot(
    series: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str, caption: str, powers: bool = False
) -> str:
    """Lines through points, as SVG.

    Args:
      series: points (x, y) of each line, by its name.
      x, y: names of the axes.
      caption: below.
      powers: the x axis is logarithmic to base 2, for numbers of candidates.
    """
    import matplotlib.figure  # takes half a second, and only reports need it

    figure = matplotlib.figure.Figure(figsize=(5, 3.2), layout="constrained")
    axis = figure.subplots()
    for name, points in series.items():
        axis.plot(*zip(*points), marker="o", markersize=4, label=name)
    if powers:
        axis.set_xscale("log", base=2)
    ticks = sorted({point[0] for points in series.values() for point in points})
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set(xlabel=x, ylabel=y)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    svg = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": caption}):  # text as text, ids that repeat
        figure.savefig(svg, format="svg", metadata={"Date": None})
    text = svg.getvalue()
    return f"<figure>{text[text.index('<svg') :]}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _flatten(figures: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat = {}
    for name, value in figures.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}, ")
        else:
            flat[prefix + str(name)] = f"{value:.4g}" if isinstance(value, (float, np.floating)) else str(value)
    return flat
