"""The rows of a batch that an accumulator counts, and rows that an accumulator keeps.

Accumulators are immutable and stay on the host, with sums in float64. Devices compute the values that go in (features,
logits, decibels).

    B batch    N rows so far    D features
"""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import numpy as np


def valid_rows(x: Any, valid: Any = None) -> np.ndarray:
    """Copies a batch to the host, without the rows that fill it up to a compiled size.

    Args:
      x: [B, ...], numpy or JAX, on one device or sharded over the devices of this host.
      valid: bool [B], rows that count, or None for all.

    Returns:
      [b, ...], in the order of the batch.

    Raises:
      ValueError: `valid` is not one truth value per row.
    """
    rows = np.asarray(x)
    if valid is None:
        return rows
    keep = np.asarray(valid)
    if keep.dtype != bool or keep.shape != rows.shape[:1]:
        raise ValueError(f"valid is {keep.dtype} {keep.shape}; expected bool {rows.shape[:1]}, one for each row.")
    return rows[keep]


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Kept rows. Appending copies only the new rows, and this object stays as it is.

    Attributes:
      values: float32 [N, D], read-only.
    """

    values: np.ndarray
    _memory: _Memory = dataclasses.field(repr=False)

    @classmethod
    def empty(cls, width: int, capacity: int = 0) -> Self:
        """Returns no rows of D = `width` numbers, with memory for `capacity` rows. More rows need more copies."""
        return cls._of(_Memory(np.empty((capacity, width), np.float32), 0))

    @classmethod
    def _of(cls, memory: _Memory) -> Self:
        values = memory.array[: memory.used]
        values.flags.writeable = False
        return cls(values, memory)

    def append(self, rows: np.ndarray) -> Self:
        """Returns these rows followed by others, [B, D]."""
        count, total, memory = len(self.values), len(self.values) + len(rows), self._memory
        if memory.used != count or total > len(memory.array):
            # Other rows follow already, or the memory is full. Twice the memory bounds the copies by 2·N rows in all.
            array = np.empty((max(total, 2 * count), self.values.shape[1]), np.float32)
            array[:count] = self.values
            memory = _Memory(array, count)
        memory.array[count:total] = rows
        memory.used = total
        return self._of(memory)


@dataclasses.dataclass(eq=False)
class _Memory:
    """Memory that successive `Rows` share: float32 [capacity, D], and the number of rows in use."""

    array: np.ndarray
    used: int
