"""A report as one HTML file that a person can open and pass on: tables, pictures and plots, nothing outside of it.

    parts = [heading("Figures"), table({"autoregressive": {...}, "maskgit": {...}}), picture(grid, "captions")]
    page.write_text(page("Quickstart", parts))

Each function gives a piece of HTML; whatever it is given is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dalle_jax.reporting.html import heading, page, paragraph, picture, plot, preformatted, table


def evaluation(title: str, figures: Mapping[str, Any], grid: np.ndarray, config: str) -> str:
    """The page of an evaluation.

    Args:
      title: of the page.
      figures: see `evaluate.py`.
      grid: captions and pictures, uint8 [H, W, 3].
      config: the configuration as text.
    """
    protocol, apart = figures["protocol"], ("best_of", "blur", "protocol", "run")
    parts = [
        paragraph(
            f"Captions: {protocol['captions']}; of {protocol['data']}; one sample each; on {protocol['device']}."
        ),
        picture(grid, "The first captions: the real picture, its reconstruction, and what the priors draw."),
        heading("Figures"),
        table({name: section for name, section in figures.items() if name not in apart}),
    ]
    if "best_of" in figures:
        parts += [
            heading("The best of N candidates, chosen by CLIP"),
            paragraph(
                f"Of the first {protocol['candidate_captions']} captions. The judge of clip_score and of figures that "
                "end in _clip is the network that chose: what rises with N there is in part its own taste."
            ),
            *_sweep(figures["best_of"], "candidates", powers=True),
        ]
    if "blur" in figures:
        parts += [
            heading("After a Gaussian blur of both sides"),
            paragraph("What a tokenizer cannot show, fine detail, counts for less there. Radius: deviation in pixels."),
            *_sweep(figures["blur"], "blur radius"),
        ]
    parts += [heading("Protocol"), table({"": {**protocol, **figures.get("run", {})}})]
    parts += [heading("Configuration"), preformatted(config)]
    return page(title, parts)


def _sweep(section: Mapping[str, Mapping[str, Mapping[str, float]]], x: str, powers: bool = False) -> list[str]:
    """A plot of every figure, and the table."""
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
