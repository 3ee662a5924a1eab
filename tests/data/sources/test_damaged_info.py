"""A damaged description of a prepared data set is one line that names the file."""

import pathlib
import re

import pytest
import tiny_copies

from dalle_jax.data.sources.open import open_source
from dalle_jax.data.sources.source import DataOptions
from dalle_jax.errors import DataError


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The options of a prepared data set, and the folder of its files."""
    root = tmp_path_factory.mktemp("tar")
    tiny_copies.tar_shards(root / "shards", shards=1)
    options = DataOptions(source="tar_shards", path=str(root / "shards"), data_dir=str(root / "data"))
    assert len(open_source(options, "all")) == 10
    (info,) = pathlib.Path(root).rglob("index.json")
    return options, info.parent


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"7", b"{", b"\xff", b"[" * 100_000])
def test_a_damaged_description(prepared, content):
    (options, folder), name = prepared, "index.json"
    before = (folder / name).read_bytes()
    (folder / name).write_bytes(content)
    try:
        with pytest.raises(DataError, match=re.escape(str(folder / name))) as error:
            open_source(options, "all")
        assert "\n" not in str(error.value)
    finally:
        (folder / name).write_bytes(before)


def test_a_description_of_another_kind(prepared):
    options, folder = prepared
    before = (folder / "index.json").read_bytes()
    (folder / "index.json").write_text('{"splits": {"a": [1]}, "unknown": 7}')
    try:
        with pytest.raises(DataError, match=re.escape(str(options.data_dir))):
            open_source(options, "all")
    finally:
        (folder / "index.json").write_bytes(before)
