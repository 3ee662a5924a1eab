"""The metric that selects the best checkpoint, and its direction.

A task names it as "mse" if lower values are better, and as "+psnr" if higher values are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Self


@dataclasses.dataclass(frozen=True)
class BestMetric:
    """A metric with its direction.

    Attributes:
      name: key of the metrics of an evaluation.
      higher: whether higher values are better.
    """

    name: str
    higher: bool = False

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads "mse" (lower is better) or "+psnr" (higher is better)."""
        return cls(text.removeprefix("+"), text.startswith("+"))

    def loss(self, metrics: Mapping[str, Any]) -> float:
        """Returns the metric so that lower is better; infinity if it is missing, None or not a number."""
        value = metrics.get(self.name)
        if value is None or math.isnan(value):
            return math.inf
        return -float(value) if self.higher else float(value)
