"""The report of an evaluation as one HTML page."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dalle_jax.evaluation.measure import Measured
from dalle_jax.priors.sampling import SamplingOptions
from dalle_jax.reporting.curves import loss_curve
from dalle_jax.reporting.html import (
    code,
    details,
    folded,
    gallery,
    heading,
    page,
    paragraph,
    side_by_side,
    table,
)
from dalle_jax.reporting.line_chart import plot

_APART = ("best_of", "blur", "protocol", "run")  # sections of the metrics that the first table leaves out
_OTHERS = {"dvae": "Metrics of the image tokenizer", "clip": "Metrics of CLIP"}
_ROWS = 6  # captions that are shown unfolded
_USUAL = dataclasses.asdict(SamplingOptions())


def evaluation(
    title: str,
    measured: Measured,
    captions: Sequence[str],
    config: str,
    losses: Mapping[str, Sequence[Mapping[str, Any]]],
) -> str:
    """Returns the page of an evaluation.

    Args:
      title: title of the page.
      measured: the result of the evaluation.
      captions: at least one for each image in a column.
      config: the configuration as text; the page shows it folded.
      losses: lines of the `metrics.jsonl` of each training, by its name.
    """
    metrics, rows = measured.metrics, _rows(captions, measured.columns)
    protocol = metrics["protocol"]
    if any(name == "real" for name, _ in measured.columns):
        requests, what = "captions", f"Captions: {protocol['captions']}. One sample per caption."
        shown = "The real image, its reconstruction, and the images that the priors drew."
    else:  # classes have no real image each
        requests, what = "classes", f"Drawn: {protocol['captions']}."
        shown = "One image of each class from each prior."
    parts = [
        paragraph(f"{what} Data: {protocol['data']}. Device: {protocol['device']}."),
        heading(f"The first {requests}"),
        paragraph(f"{shown} Click to enlarge."),
        gallery(rows[:_ROWS]),
        *([folded(f"{len(rows) - _ROWS} more {requests}", gallery(rows[_ROWS:]))] if len(rows) > _ROWS else []),
        *_metrics(measured),
        *_showcases(measured),
        *_code(measured, captions[0]),
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
    if curves := side_by_side([loss_curve(lines, name) for name, lines in losses.items()]):
        parts += [heading("The trainings"), curves]
    settings = _without_none({**protocol, **metrics.get("run", {})})
    parts += [heading("Protocol"), table({"": settings}), details("Configuration", config)]
    return page(title, parts)


def _metrics(measured: Measured) -> list[str]:
    """Returns the tables of metrics: the priors together, then the image tokenizer and CLIP."""
    sections = {name: section for name, section in measured.metrics.items() if name not in _APART}
    parts = []
    if priors := {name: section for name, section in sections.items() if name not in _OTHERS}:
        parts += [heading("Metrics of the drawn images"), table(priors, explain=True)]
    for name, title in _OTHERS.items():
        if name in sections:
            parts += [heading(title), table({name: sections[name]}, explain=True)]
    return parts


def _rows(
    captions: Sequence[str], columns: Sequence[tuple[str, np.ndarray]]
) -> list[tuple[str, list[tuple[str, np.ndarray]]]]:
    """Returns a row for each caption: the images of all columns, with the heading of their column."""
    headings, owner = [], ""
    for name, _ in columns:
        best = name.startswith("best of")
        headings.append(f"{owner}, {name}" if best else name)  # it stands to the right of its prior
        owner = owner if best else name
    count = min(len(images) for _, images in columns)
    return [(captions[i], [(head, images[i]) for head, (_, images) in zip(headings, columns)]) for i in range(count)]


def _showcases(measured: Measured) -> list[str]:
    parts = []
    for name, shown in measured.showcases.items():
        parts += [
            heading(f"How {name} draws"),
            paragraph("The image after each decoding step. Tokens that are still masked are light grey."),
            gallery(shown.unmasking),
            heading(f"How {name} edits"),
            paragraph("Real images and four edits of each. The caption above a row describes its real image."),
            gallery(shown.edits),
        ]
    return parts


def _code(measured: Measured, caption: str) -> list[str]:
    """Returns the programs and commands that draw with the measured priors as the evaluation did."""
    protocol, parts = measured.metrics["protocol"], []
    for name, workdir in measured.workdirs.items():
        sampling = protocol["sampling"][name]
        changed = {key: value for key, value in sampling.items() if value != _USUAL[key]}
        arguments = "".join(f", {key}={value!r}" for key, value in changed.items())
        program = (
            "from dalle_jax import TextToImage, save, show\n\n"
            f"model = TextToImage.load({workdir!r})\n"
            f"images = model.generate({caption!r}, n=8, seed={protocol['seed']}{arguments})\n"
            "show(images)\n"
            'save(images, "drawn")'
        )
        flags = {"config.model_workdir": workdir, "config.prompts": caption, "config.n": 8}
        flags |= {"config.seed": protocol["seed"]}
        flags |= {f"config.sampling.{key}": value for key, value in changed.items()}
        command = "python -m dalle_jax.main --config=generate " + " ".join(
            f"--{key}={shlex.quote(str(value))}" for key, value in flags.items()
        )
        parts += [heading(f"With {name}", 3), code(program), code(command)]
    return [heading("Draw your own"), *parts] if parts else []


def _without_none(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns nested settings without those that are None, which stands for "not used"."""
    found = {key: _without_none(value) if isinstance(value, Mapping) else value for key, value in settings.items()}
    return {key: value for key, value in found.items() if value is not None}


def _sweep(section: Mapping[str, Mapping[str, Mapping[str, float]]], x: str, powers: bool = False) -> list[str]:
    """Returns a plot of every metric, and the table."""
    names = dict.fromkeys(name for rows in section.values() for row in rows.values() for name in row)
    plots = []
    for name in names:
        if not name.endswith("_std"):
            points = {
                line: [(float(at), row[name]) for at, row in rows.items() if name in row]
                for line, rows in section.items()
            }
            plots.append(plot(points, x, name, f"{name} by {x}", powers))
    columns = {f"{line}, {at}": row for line, rows in section.items() for at, row in rows.items()}
    return [side_by_side(plots), folded("All values", table(columns, names_down=True))]
