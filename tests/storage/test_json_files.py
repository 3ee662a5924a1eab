"""Damaged JSON is one line that names the file, wherever it is read."""

import pytest
from damaged_json import DAMAGED, put

from dalle_jax.errors import DataError
from dalle_jax.storage import json_files


@pytest.mark.parametrize("damage", [*DAMAGED, "list", "folder", "pipe", "missing"])
def test_a_damaged_file(tmp_path, damage):
    put(tmp_path / "a.json", damage)
    with pytest.raises(DataError, match=r"a\.json") as error:
        json_files.read(tmp_path / "a.json", dict, DataError, "Write it again.")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500 and str(error.value).endswith("Write it again.")


def test_both_kinds(tmp_path):
    (tmp_path / "a.json").write_text('{"a": [1]}')
    assert json_files.read(tmp_path / "a.json", dict, DataError, "") == {"a": [1]}
    assert json_files.parse("[1]", list) == [1]
    with pytest.raises(json_files.WrongJson, match="object"):
        json_files.parse("{}", list)
