"""Curves of a training from the lines of its `metrics.jsonl`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dalle_jax.reporting.line_chart import plot
from dalle_jax.reporting.meanings import meaning
from dalle_jax.reporting.units import unit

Lines = Iterable[Mapping[str, Any]]

_KINDS = {"training": "train/", "validation": "eval/"}


def loss_curve(lines: Lines, name: str) -> str:
    """Plots the loss of a training by step, on training and on validation examples; "" without any.

    Args:
      lines: of `metrics.jsonl`: "step", and values by name.
      name: of the training, for the caption.
    """
    return curve(lines, "loss", f"{name}: loss")


def curve(lines: Lines, metric: str, caption: str = "") -> str:
    """Plots a metric by step, on training and on validation examples; "" if it was never measured.

    Args:
      lines: of `metrics.jsonl`.
      metric: its name without "train/" or "eval/".
      caption: text below the plot. Without one, the metric's direction and meaning.
    """
    lines = list(lines)
    series = {
        kind: [(line["step"], line[prefix + metric]) for line in lines if line.get(prefix + metric) is not None]
        for kind, prefix in _KINDS.items()
    }
    if not caption:
        found = meaning(metric)
        caption = metric if found is None else f"{found.direction_as_sentence()} {found.sentence}".lstrip()
    label = f"{metric} ({unit(metric)})" if unit(metric) not in ("", "%") else metric
    return plot(series, "step", label, caption)


def measured(lines: Lines) -> list[str]:
    """Returns the names of the metrics of evaluations, without "eval/", in the order in which they appeared."""
    names = (name for line in lines for name in line if name.startswith("eval/"))
    return [name.removeprefix("eval/") for name in dict.fromkeys(names)]
