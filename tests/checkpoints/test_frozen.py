"""Tests of frozen modules: they load completely, or the error says what to do."""

import json
import random

import numpy as np
import pytest
from full_disk import fill_disk, needs_full_device

from dalle_jax.checkpoints import frozen
from dalle_jax.errors import CheckpointError, DamagedError, UserError

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


@pytest.mark.parametrize("name", ["options.json", "params.msgpack"])
def test_flipped_bits(tmp_path, name):
    """The module loads with the same values, or its damage is named."""
    frozen.save(tmp_path, {"width": 3, "dtype": "float32"}, PARAMS)
    content, draw, noticed = (tmp_path / name).read_bytes(), random.Random(0), 0
    for _ in range(200):
        harmed = bytearray(content)
        harmed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        (tmp_path / name).write_bytes(harmed)
        try:
            options, params = frozen.load(tmp_path, "Do this.")
        except DamagedError as error:
            assert name in str(error) or name == "options.json"
            noticed += 1
            continue
        if "checksums" not in json.loads(harmed):
            assert set(options) != {"width", "dtype"}, "the reader of the options names the unknown key"
            continue
        assert options == {"width": 3, "dtype": "float32"}
        np.testing.assert_array_equal(params["a"]["kernel"], PARAMS["a"]["kernel"])
    assert noticed > (199 if name == "params.msgpack" else 100)


def test_parts_of_two_modules(tmp_path):
    """Options and parameters of different modules do not load together."""
    frozen.save(tmp_path / "a", {"width": 3}, PARAMS)
    frozen.save(tmp_path / "b", {"width": 3}, {"a": {"kernel": -PARAMS["a"]["kernel"]}})
    for name in ("options.json", "params.msgpack"):
        content = (tmp_path / "a" / name).read_bytes()
        (tmp_path / "a" / name).write_bytes((tmp_path / "b" / name).read_bytes())
        with pytest.raises(DamagedError, match=r"params\.msgpack"):
            frozen.load(tmp_path / "a", "")
        (tmp_path / "a" / name).write_bytes(content)


def test_a_module_of_an_earlier_version(tmp_path, caplog):
    """A module without checksums loads, and the log says once that it is unchecked."""
    caplog.set_level("INFO")
    frozen.save(tmp_path, {"width": 3}, PARAMS)
    options = json.loads((tmp_path / "options.json").read_text())
    (tmp_path / "options.json").write_text(json.dumps({"width": options["width"]}))
    for _ in range(2):
        options, params = frozen.load(tmp_path, "")
    assert options == {"width": 3} and caplog.text.count("no checksum") == 1
    np.testing.assert_array_equal(params["a"]["kernel"], PARAMS["a"]["kernel"])
    for damaged in (b"\xc1", b"", b"\x92\x01", b"\xd9"):
        (tmp_path / "params.msgpack").write_bytes(damaged)
        with pytest.raises(DamagedError, match="Do this"):
            frozen.load(tmp_path, "Do this.")


@needs_full_device
@pytest.mark.parametrize("name", ["options.json", "params.msgpack"])
def test_a_full_disk(tmp_path, monkeypatch, name):
    fill_disk(monkeypatch, name)
    with pytest.raises(UserError, match="No space left.* bytes needed"):
        frozen.save(tmp_path, {"width": 3}, PARAMS)
    assert not frozen.exists(tmp_path)
