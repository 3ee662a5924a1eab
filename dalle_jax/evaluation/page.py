"""The report of an evaluation as one HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dalle_jax.reporting.html import details, heading, image, page, paragraph, plot, table


def evaluation(title: str, metrics: Mapping[str, Any], grid: np.ndarray, config: str) -> str:
    """Returns the page of an evaluation.

    Args:
      title: title of the page.
      metrics: `Measured.metrics`.
      grid: captions and images, uint8 [H, W, 3].
      config: the configuration as text; the page shows it folded.
    """
    protocol, apart = metrics["protocol"], ("best_of", "blur", "protocol", "run")
    parts = [
        paragraph(
            f"Captions: {protocol['captions']}. Data: {protocol['data']}. One sample per caption. Device: "
            f"{protocol['device']}."
        ),
        image(grid, "The first captions: the real image, its reconstruction, and the images that the priors drew."),
        heading("Metrics"),
        table({name: section for name, section in metrics.items() if name not in apart}),
    ]
    if "best_of" in metrics:
        parts += [
            heading("The best of N candidates, chosen by CLIP"),
            paragraph(
                f"Over the first {protocol['candidate_captions']} captions. The CLIP that chose the images also "
                "computes clip_score and the metrics that end in _clip. Part of their rise with N is therefore that "
                "CLIP's bias."
            ),
            *_sweep(metrics["best_of"], "candidates", powers=True),
        ]
    if "blur" in metrics:
        parts += [
            heading("After a Gaussian blur of both sides"),
            paragraph(
                "Blur removes fine detail, which an image tokenizer cannot reproduce. The radius is the standard "
                "deviation in pixels."
            ),
            *_sweep(metrics["blur"], "blur radius"),
        ]
    parts += [heading("Protocol"), table({"": {**protocol, **metrics.get("run", {})}})]
    parts += [details("Configuration", config)]
    return page(title, parts)


def _sweep(section: Mapping[str, Mapping[str, Mapping[str, float]]], x: str, powers: bool = False) -> list[str]:
    """Returns a plot of every metric, and the table."""
    names = dict.fromkeys(name for rows in section.values() for row in rows.values() for name in row)
    plots = [
        plot(
            {line: [(float(at), row[name]) for at, row in rows.items()] for line, rows in section.items()},
            x, name, f"{name} by {x}", powers,
        )
        for name in names
        if not name.endswith("_std")
    ]  # fmt: skip
    columns = {f"{line}, {at}": row for line, rows in section.items() for at, row in rows.items()}
    return [f'<div class="plots">{"".join(plots)}</div>', table(columns, names_down=True)]
