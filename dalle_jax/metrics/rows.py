"""The rows of a batch that an accumulator counts.

Accumulators are frozen dataclasses on the host, with sums in float64. Devices compute the values that go in (features,
logits, decibels).
"""

from __future__ import annotations

from typing import Any

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
