"""Running means of scalars."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class Mean:
    """Running mean of scalars over steps or batches. Values that are not finite are left out."""

    def __init__(self):
        self._sums: dict[str, list[float]] = {}

    def add(self, scalars: Mapping[str, Any], weight: float = 1.0) -> None:
        """Adds the scalars of one step, or of a batch with `weight` rows."""
        for name, value in scalars.items():
            total = self._sums.setdefault(name, [0.0, 0.0])
            if math.isfinite(value):
                total[0] += float(value) * weight
                total[1] += weight

    def take(self) -> dict[str, float]:
        """Returns the means (NaN without a finite value) and resets them."""
        means = {name: total / count if count else math.nan for name, (total, count) in self._sums.items()}
        self._sums = {}
        return means


def without_empty(means: Mapping[str, float]) -> dict[str, float]:
    """Drops the means without a finite value, such as that of a range of mask ratios without an example.

    If "loss" has no finite value either, the numbers are not finite, and all of them are kept.
    """
    if not math.isfinite(means.get("loss", math.nan)):
        return dict(means)
    return {name: value for name, value in means.items() if math.isfinite(value)}
