"""The rows of a batch that count."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dalle_jax.metrics.rows import valid_rows

ROWS = np.arange(24).reshape(8, 3)
VALID = np.array([True, False, True, True, True, True, True, False])


def test_invalid_rows_are_skipped():
    np.testing.assert_array_equal(valid_rows(ROWS), ROWS)
    np.testing.assert_array_equal(valid_rows(ROWS, VALID), ROWS[[0, 2, 3, 4, 5, 6]])


def test_sharded_rows_keep_the_order_of_the_batch():
    """Also if several devices hold each row, or the devices are in another order."""
    devices = np.array(jax.devices())
    for layout in (devices, devices[::-1]):
        once = NamedSharding(jax.sharding.Mesh(layout, "a"), PartitionSpec("a"))
        twice = NamedSharding(jax.sharding.Mesh(layout.reshape(2, 4), ("b", "a")), PartitionSpec("a"))
        for sharding in (once, twice):
            rows, valid = jax.device_put((ROWS, VALID), sharding)
            np.testing.assert_array_equal(valid_rows(rows, valid), ROWS[VALID])


@pytest.mark.parametrize("valid", [VALID[:7], VALID.astype(int), VALID[:, None]], ids=["short", "int", "rank"])
def test_valid_must_be_one_truth_value_per_row(valid):
    with pytest.raises(ValueError, match="valid"):
        valid_rows(ROWS, valid)
