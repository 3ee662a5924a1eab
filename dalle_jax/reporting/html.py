"""A report as one HTML file: headings, tables, images and plots. The file loads nothing from outside.

    parts = [heading("Metrics"), table({"autoregressive": {...}, "maskgit": {...}}), image(grid, "captions")]
    write_file(path, page("Quickstart", parts))

Each function returns a piece of HTML and escapes the text that it is given.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dalle_jax.reporting.images import png

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #202124; max-width: 70em; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.7em; } h2 { font-size: 1.25em; margin-top: 2em; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { padding: .25em .9em .25em 0; text-align: left; border-bottom: 1px solid #e8eaed; font-weight: normal; }
th { color: #5f6368; } td { font-variant-numeric: tabular-nums; }
figure { margin: 1em 0; } .plots { display: flex; flex-wrap: wrap; } .plots figure { flex: 1 1 22em; max-width: 30em; }
figcaption { color: #5f6368; } img, svg { max-width: 100%; height: auto; }
summary { font-size: 1.25em; margin-top: 2em; cursor: pointer; }
pre { background: #f8f9fa; padding: 1em; overflow-x: auto; font-size: 13px; }
"""


def page(title: str, parts: Sequence[str]) -> str:
    """Joins pieces of HTML, in order, to the whole file."""
    title = html.escape(title)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def heading(text: str) -> str:
    return f"<h2>{html.escape(text)}</h2>"


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def details(summary: str, text: str) -> str:
    """Returns preformatted text, for instance a configuration, folded under a summary that opens it."""
    return f"<details><summary>{html.escape(summary)}</summary><pre>{html.escape(text)}</pre></details>"


def table(columns: Mapping[str, Mapping[str, Any]], names_down: bool = False) -> str:
    """Returns a table of metrics: a column for each name, and a row for each metric that any of them has.

    Args:
      columns: metrics by name. Nested metrics become rows "outer, inner".
      names_down: exchange rows and columns.
    """
    flat = {name: _flatten(metrics) for name, metrics in columns.items()}
    names = list(dict.fromkeys(name for metrics in flat.values() for name in metrics))
    if names_down:
        flat, names, columns = {name: {of: flat[of].get(name, "") for of in flat} for name in names}, list(flat), names
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("", *columns))
    rows = [
        f"<tr><th>{html.escape(name)}</th>"
        + "".join(f"<td>{html.escape(metrics.get(name, ''))}</td>" for metrics in flat.values())
        + "</tr>"
        for name in names
    ]
    return f"<table>\n<tr>{head}</tr>\n" + "\n".join(rows) + "\n</table>"


def image(pixels: np.ndarray, caption: str) -> str:
    """Embeds an image, uint8 [H, W, 3], with a caption."""
    data = base64.b64encode(png(pixels)).decode()
    caption = html.escape(caption)
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'
    )


def plot(
    series: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str, caption: str, powers: bool = False
) -> str:
    """Plots lines through points, as SVG.

    Args:
      series: points (x, y) of each line, by its name.
      x, y: labels of the axes.
      caption: text below the plot.
      powers: use a logarithmic x axis of base 2, for numbers of candidates.
    """
    import matplotlib.figure  # imported here because it takes half a second

    canvas = matplotlib.figure.Figure(figsize=(5, 3.2), layout="constrained")
    axis = canvas.subplots()
    lines = [axis.plot(*zip(*points), marker="o", markersize=4)[0] for points in series.values()]
    if powers:
        axis.set_xscale("log", base=2)
    ticks = sorted({point[0] for points in series.values() for point in points})
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set(xlabel=x, ylabel=y)
    axis.grid(alpha=0.3)
    legend = axis.legend(lines, list(series), frameon=False)
    for text in (*legend.get_texts(), axis.xaxis.label, axis.yaxis.label):
        text.set_parse_math(False)  # a workdir may be named "$x"
    svg = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": caption}):  # text as text, equal ids every run
        canvas.savefig(svg, format="svg", metadata={"Date": None})
    text = svg.getvalue()
    return f"<figure>{text[text.index('<svg') :]}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _flatten(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}, ")
        else:
            flat[prefix + str(name)] = f"{value:.4g}" if isinstance(value, (float, np.floating)) else str(value)
    return flat
