"""A function of fixed batch size, applied to any number of rows."""

import numpy as np
import pytest

from dalle_jax.distributed.chunks import in_chunks
from dalle_jax.distributed.mesh import make_mesh


@pytest.mark.parametrize("count", [1, 3, 4, 9])
def test_all_rows_once_and_in_order(count):
    rows, sizes = np.arange(2 * count).reshape(count, 2), []

    def double(chunk):
        sizes.append(len(chunk))
        return {"double": 2 * chunk, "first": chunk[:, 0]}

    found = in_chunks(double, rows, 4)
    np.testing.assert_array_equal(found["double"], 2 * rows)
    np.testing.assert_array_equal(found["first"], rows[:, 0])
    assert sizes == [4] * -(-count // 4)


@pytest.mark.parametrize("size, each", [(16, 2), (4, 1)])
def test_devices_share_a_chunk(size, each):
    """Each device gets the same number of rows, at least one."""
    rows, mesh = np.arange(18).reshape(9, 2), make_mesh(data=8)

    def triple(chunk):
        assert len(chunk.addressable_shards) == 8 and chunk.addressable_shards[0].data.shape == (each, 2)
        return 3 * chunk

    np.testing.assert_array_equal(in_chunks(triple, rows, size, mesh), 3 * rows)
