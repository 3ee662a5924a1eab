"""Tests of frozen modules: they load completely, or the error says what to do."""

import os

import numpy as np
import pytest

from dalle_jax.checkpoints import frozen
from dalle_jax.errors import CheckpointError, UserError

PARAMS = {"a": {"kernel": np.arange(6.0, dtype=np.float32).reshape(2, 3)}}


def test_round_trip(tmp_path):
    assert not frozen.exists(tmp_path / "module")
    frozen.save(tmp_path / "module", {"width": 3}, PARAMS)
    assert frozen.exists(tmp_path / "module")
    options, params = frozen.load(tmp_path / "module", "")
    assert options == {"width": 3}
    np.testing.assert_array_equal(params["a"]["kernel"], PARAMS["a"]["kernel"])


@pytest.mark.parametrize("name", ["options.json", "params.msgpack"])
@pytest.mark.parametrize("harm", ["missing", "half"])
def test_damaged(tmp_path, name, harm):
    frozen.save(tmp_path, {"width": 3}, PARAMS)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink()
    if harm == "half":
        (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="Do this"):
        frozen.load(tmp_path, "Do this.")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no disk to be full")
@pytest.mark.parametrize("name", ["options.json", "params.msgpack"])
def test_a_full_disk(tmp_path, name):
    (tmp_path / f"{name}.unfinished").symlink_to("/dev/full")
    with pytest.raises(UserError, match="No space left"):
        frozen.save(tmp_path, {"width": 3}, PARAMS)
    assert not frozen.exists(tmp_path) and not (tmp_path / f"{name}.unfinished").is_symlink()
