"""Running means of scalars."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class Mean:
    """Running mean of scalars, over the steps between two log lines or over batches; what is not finite is left out."""

    def __init__(self):
        self._sums: dict[str, list[float]] = {}

    def add(self, scalars: Mapping[str, Any], weight: float = 1.0) -> None:
        """Adds the scalars of one step, or of a batch of `weight` rows."""
        for name, value in scalars.items():
            total = self._sums.setdefault(name, [0.0, 0.0])
            if math.isfinite(value):
                total[0] += float(value) * weight
                total[1] += weight

    def take(self) -> dict[str, float]:
        """The means so far (nan: no finite value); starts anew."""
        means = {name: total / count if count else math.nan for name, (total, count) in self._sums.items()}
        self._sums = {}
        return means
