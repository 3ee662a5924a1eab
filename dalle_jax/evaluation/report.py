"""Writes an evaluation as `report.html`, `report.json`, `grid.png` and CSV files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from dalle_jax.evaluation.measure import Measured
from dalle_jax.evaluation.page import evaluation
from dalle_jax.evaluation.sections import Metrics
from dalle_jax.reporting import tables
from dalle_jax.reporting.images import image_grid, save_png
from dalle_jax.reporting.metric_writer import read_metrics
from dalle_jax.reporting.tables import csv_text, plain_text, save_json
from dalle_jax.storage.files import write_file


def write(
    measured: Measured,
    captions: Sequence[str],
    out: epath.PathLike,
    title: str,
    config: ConfigDict,
    trainings: Mapping[str, str] | None = None,
) -> None:
    """Writes `report.json`, `report.html`, `grid.png`, `blur.csv` and `best_of.csv`, and prints the metrics.

    Args:
      measured: the result of the evaluation.
      captions: at least one for each row of the grid.
      out: the folder.
      title: title of the report.
      config: the configuration of the evaluation.
      trainings: workdirs whose losses the report shows, by their names; None for those of the priors.

    Raises:
      UserError: a file cannot be written.
    """
    out, metrics = epath.Path(out).expanduser(), measured.metrics
    sheet = _grid(captions, measured.columns, title)
    save_png(out / "grid.png", sheet)
    save_json(out / "report.json", metrics)
    written = ["report.html", "report.json", "grid.png"]
    for name, head in (("blur", ("images", "radius")), ("best_of", ("prior", "candidates"))):
        if name in metrics:
            write_file(out / f"{name}.csv", _csv(metrics[name], head))
            written.append(f"{name}.csv")
    settings = plain_text(config.copy_and_resolve_references().to_dict())
    losses = {name: read_metrics(workdir) for name, workdir in (trainings or measured.workdirs).items()}
    write_file(out / "report.html", evaluation(title, measured, captions, settings, losses))
    apart = ("blur", "best_of", "protocol")
    print("\n" + tables.table({name: value for name, value in metrics.items() if name not in apart}))
    print("\n" + "\n".join(str(out / name) for name in written))


def _csv(section: Mapping[str, Mapping[str, Metrics]], head: tuple[str, str]) -> str:
    """Formats a section as CSV, one line per name and number."""
    names = list(dict.fromkeys(name for rows in section.values() for row in rows.values() for name in row))
    rows = [
        [outer, inner, *(float(row[name]) if name in row else "" for name in names)]
        for outer, rows in section.items()
        for inner, row in rows.items()
    ]
    return csv_text([[*head, *names], *rows])


def _grid(captions: Sequence[str], columns: Sequence[tuple[str, np.ndarray]], title: str) -> np.ndarray:
    """Draws captions next to their images: uint8 [H', W', 3].

    Args:
      captions: at least one caption per row of the grid.
      columns: heading and images, uint8 [B, H, W, 3], of each column.
      title: title of the grid.
    """
    rows = min(len(images) for _, images in columns)
    shown = [(captions[i], [images[i] for _, images in columns]) for i in range(rows)]
    names = [name for name, _ in columns]
    return image_grid(shown, names, title=title, blocks=2 if rows > 4 else 1, captions_above=True)
