"""The files of an evaluation: whole or absent, and safe to open in a spreadsheet and a browser."""

import csv
import json

import numpy as np
import pytest
from full_disk import fill_disk, needs_full_device
from ml_collections import ConfigDict

from dalle_jax.errors import UserError
from dalle_jax.evaluation.measure import Measured
from dalle_jax.evaluation.report import write

NAME = "=HYPERLINK(<b>)"


def write_report(out):
    rows = {"0": {"fid": 1.5, "bias": -0.25}, "1": {"fid": 2.0, "bias": 0.5}}
    protocol = {"captions": "<i>first</i>", "data": "@data", "device": "cpu"}
    measured = Measured({NAME: {"fid": 1.5}, "blur": {NAME: rows}, "protocol": protocol}, [])
    measured.columns.append(("real", np.zeros((2, 8, 8, 3), np.uint8)))
    write(
        measured,
        ("<script>a</script>", "b"),
        out,
        f"<u>{NAME}",
        ConfigDict({"a": "<s>"}),
    )


def test_cells_are_no_formulas_and_texts_no_markup(tmp_path):
    write_report(tmp_path)
    with open(tmp_path / "blur.csv", newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["images", "radius", "fid", "bias"]
    assert rows == [[f"'{NAME}", "0", "1.5", "-0.25"], [f"'{NAME}", "1", "2", "0.5"]]
    page = (tmp_path / "report.html").read_text()
    assert not any(mark in page for mark in ("<b>", "<i>", "<u>", "<s>", "<script>")) and "&lt;b&gt;" in page
    assert json.loads((tmp_path / "report.json").read_text())["blur"][NAME]["0"]["bias"] == -0.25


@needs_full_device
@pytest.mark.parametrize("name", ["grid.png", "report.json", "blur.csv", "report.html"])
def test_a_full_disk_is_one_line(tmp_path, monkeypatch, name):
    fill_disk(monkeypatch, name)
    with pytest.raises(UserError, match=rf"{name}.* bytes needed, [\d,]+ left") as raised:
        write_report(tmp_path)
    assert raised.value.exit_code == 1 and "\n" not in str(raised.value)
    assert not (tmp_path / name).exists() and not list(tmp_path.glob("*.unfinished"))
