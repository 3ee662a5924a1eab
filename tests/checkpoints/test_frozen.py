"""Tests of frozen modules: they load completely, or the error says what to do."""

import numpy as np
import pytest
from full_disk import fill_disk, needs_full_device

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


@needs_full_device
@pytest.mark.parametrize("name", ["options.json", "params.msgpack"])
def test_a_full_disk(tmp_path, monkeypatch, name):
    fill_disk(monkeypatch, name)
    with pytest.raises(UserError, match="No space left.* bytes needed"):
        frozen.save(tmp_path, {"width": 3}, PARAMS)
    assert not frozen.exists(tmp_path)
