"""Writes an evaluation as `report.html`, `report.json`, `grid.png` and CSV files."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from dalle_jax.evaluation.measure import Figures, Measured
from dalle_jax.evaluation.page import evaluation
from dalle_jax.evaluation.test_sets import TestSet
from dalle_jax.reporting import tables
from dalle_jax.reporting.images import image_grid, save_png
from dalle_jax.reporting.tables import save_json


def write(measured: Measured, tests: TestSet, out: epath.PathLike, title: str, config: ConfigDict) -> None:
    """Writes `report.json`, `report.html`, `grid.png`, `blur.csv` and `best_of.csv`, and prints the figures.

    Args:
      measured: what is reported.
      tests: on what.
      out: the folder.
      title: of the report.
      config: the configuration that led there.
    """
    out, figures = epath.Path(out).expanduser(), measured.figures
    sheet = _grid(tests.captions, measured.columns, title)
    save_png(out / "grid.png", sheet)
    save_json(out / "report.json", figures)
    written = ["report.html", "report.json", "grid.png"]
    for name, head in (("blur", ("pictures", "radius")), ("best_of", ("prior", "candidates"))):
        if name in figures:
            (out / f"{name}.csv").write_text(_csv(figures[name], head))
            written.append(f"{name}.csv")
    (out / "report.html").write_text(evaluation(title, figures, sheet, config.to_yaml()))
    apart = ("blur", "best_of", "protocol")
    print("\n" + tables.table({name: value for name, value in figures.items() if name not in apart}))
    print("\n" + "\n".join(str(out / name) for name in written))


def _csv(section: Mapping[str, Mapping[str, Figures]], head: tuple[str, str]) -> str:
    """A line for each name and number."""
    names = list(dict.fromkeys(name for rows in section.values() for row in rows.values() for name in row))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*head, *names])
    for outer, rows in section.items():
        for inner, row in rows.items():
            table.writerow([outer, inner, *(f"{row[name]:.6g}" if name in row else "" for name in names)])
    return text.getvalue()


def _grid(captions: Sequence[str], columns: Sequence[tuple[str, np.ndarray]], title: str) -> np.ndarray:
    """Captions beside their pictures: uint8 [H', W', 3].

    Args:
      captions: as many as there are pictures, or more.
      columns: heading and pictures, uint8 [B, H, W, 3], of each column.
      title: over everything.
    """
    rows = min(len(images) for _, images in columns)
    shown = [(captions[i], [images[i] for _, images in columns]) for i in range(rows)]
    return image_grid(shown, [name for name, _ in columns], title=title, blocks=2 if rows > 4 else 1)
