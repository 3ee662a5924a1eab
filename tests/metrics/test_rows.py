"""The rows of a batch that count, and rows that are kept."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dalle_jax.metrics.rows import Rows, valid_rows

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


# -- kept rows ----------------------------------------------------------------------------------------------------


def kept(parts, capacity=0):
    """Returns all versions of rows that grow by one part at a time."""
    versions = [Rows.empty(3, capacity)]
    for part in parts:
        versions.append(versions[-1].append(part))
    return versions


PARTS = [np.float32(np.random.default_rng(i).normal(size=(i % 5, 3))) for i in range(200)]


@pytest.mark.parametrize("capacity", [0, 7, 1000])
def test_rows_grow_and_earlier_versions_stay(capacity):
    for count, version in enumerate(kept(PARTS, capacity)):
        np.testing.assert_array_equal(version.values, np.concatenate([np.zeros((0, 3)), *PARTS[:count]]))
        assert version.values.dtype == np.float32


def test_rows_are_copied_at_most_three_times_in_all():
    """Once when they are added, and twice in all when the memory doubles. With enough memory, only once."""
    total = sum(map(len, PARTS))
    for capacity, most in ((0, 2 * total), (total, 0)):
        versions = kept(PARTS, capacity)
        copied = sum(len(a.values) for a, b in zip(versions, versions[1:]) if not np.shares_memory(a.values, b.values))
        assert copied <= most


def test_two_continuations_of_the_same_rows():
    """The second one copies the rows, so that it does not overwrite the first."""
    start = kept(PARTS[:4], 100)[-1]
    one, other = start.append(PARTS[4]), start.append(-PARTS[4])
    np.testing.assert_array_equal(one.values[-4:], PARTS[4])
    np.testing.assert_array_equal(other.values[-4:], -PARTS[4])
    np.testing.assert_array_equal(one.values[:-4], other.values[:-4])


def test_kept_rows_are_read_only():
    with pytest.raises(ValueError, match="read-only"):
        kept(PARTS[:4])[-1].values[0] = 1
