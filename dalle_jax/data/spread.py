"""Examples spread evenly over a source, for previews and for a look at the data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from dalle_jax.data.sources.source import Record, Source


def evenly(length: int, count: int) -> np.ndarray:
    """Returns up to `count` different places in [0, length), spread evenly, in rising order: int64 [n]."""
    return np.linspace(0, length - 1, min(length, count)).round().astype(np.int64)


def in_spread_order(length: int) -> Iterator[int]:
    """Yields the places in [0, length) in an order whose every beginning is spread evenly (a golden-section stride)."""
    stride = max(1, round(length * (math.sqrt(5) - 1) / 2))
    while math.gcd(stride, length) > 1:
        stride += 1
    return (place * stride % length for place in range(length))


class Selected(Source):
    """Some examples of another source, in a given order."""

    def __init__(self, source: Source, places: Sequence[int]):
        """Selects `places`, indices in `source`."""
        self._source, self._places = source, places
        self.description = source.description

    def __len__(self) -> int:
        return len(self._places)

    def record(self, index: int) -> Record:
        """See `Source.record`."""
        return self._source.record(int(self._places[index]))
