"""Grids of images, and tables of metrics."""

import csv
import io
import json

import numpy as np
import pytest
from PIL import Image

from dalle_jax.reporting.images import image_grid, save_png, to_uint8
from dalle_jax.reporting.tables import csv_text, plain_text, save_json, table


def plain(value, size=16):
    return np.full((size, size, 3), value, np.uint8)


def test_to_uint8():
    values = np.array([[-0.1, 0.0, 0.4 / 255, 0.6 / 255, 0.5, 1.0, 1.2]])
    assert to_uint8(values).tolist() == [[0, 0, 0, 1, 128, 255, 255]]


def find(sheet, image):
    """Returns whether the sheet contains the image, pixel for pixel."""
    windows = np.lib.stride_tricks.sliding_window_view(sheet, image.shape)
    return (windows == image).all((-1, -2, -3)).any()


def test_a_grid_contains_every_image():
    noise = np.random.default_rng(0).integers(0, 256, (3, 2, 8, 8, 3), np.uint8)
    rows = [(f"a caption, number {i}", list(pair)) for i, pair in enumerate(noise)]
    sheet = image_grid(rows, ("real", "generated"), title="A title", cell_size=16)
    assert sheet.dtype == np.uint8 and sheet.shape[2] == 3
    for image in noise.reshape(-1, 8, 8, 3):  # enlarged twofold, without smoothing
        assert find(sheet, image.repeat(2, axis=0).repeat(2, axis=1))


@pytest.mark.parametrize("captions_above", [False, True])
def test_a_long_title_takes_more_lines_and_is_not_cut(captions_above):
    rows, how = [("", [plain(100)])] * 2, dict(cell_size=128, captions_above=captions_above)
    short, long = (image_grid(rows, title=title, **how) for title in ("word", "word " * 8))
    taller = len(long) - len(short)
    assert taller > 0 and long.shape[1] == short.shape[1]
    np.testing.assert_array_equal(long[taller + 60 :], short[60:])
    assert (long[:, -16:] == long[0, 0]).all(), "the margin is empty"


def test_blocks_are_placed_side_by_side():
    rows = [("word " * 40, [plain(100)])] * 5
    tall, wide = image_grid(rows), image_grid(rows, blocks=2)
    assert wide.shape[0] < tall.shape[0] and wide.shape[1] > tall.shape[1]


def test_large_images_are_shrunk():
    assert find(image_grid([("a", [plain(77, 64)])], cell_size=32), plain(77, 32))


def test_rows_of_different_lengths_are_rejected():
    for rows in ([], [("a", [plain(0)]), ("b", [])]):
        with pytest.raises(ValueError, match="row"):
            image_grid(rows)


def test_png_round_trip(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    save_png(tmp_path / "new" / "a.png", image)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "new" / "a.png")), image)


def test_json_and_table(tmp_path):
    metrics = {"dvae": {"psnr": 21.123456789, "usage": np.float32(0.5)}, "counts": [1, 2.00000001], "device": "cpu"}
    save_json(tmp_path / "new" / "report.json", metrics)
    assert json.loads((tmp_path / "new" / "report.json").read_text()) == {
        "dvae": {"psnr": 21.1235, "usage": 0.5}, "counts": [1, 2.0], "device": "cpu",
    }  # fmt: skip
    lines = table({"dvae": {"psnr": 21.123456789}, "device": "cpu"}).splitlines()
    assert lines == ["  dvae.psnr  21.12", "  device     cpu"]
    assert table({}) == ""


def test_plain_text_is_short_yaml_without_tags():
    text = plain_text({"job": "evaluate", "blur": (0, 1), "model": {"trunk": {"width": 16, "head_dim": None}}})
    assert text.splitlines() == ["job: evaluate", "blur: [0, 1]", "model:", "  trunk: {width: 16, head_dim: null}"]


def test_cells_that_a_spreadsheet_would_run_are_escaped():
    texts = ["=1+1", "+1", "-1", "@x", "\t=1", "\r=1", "\n=1", "＝1", "a=1", "", "x\r=1"]
    rows = list(csv.reader(io.StringIO(csv_text([texts, ["a,b", -1.5, 0.123456789, np.float32(-2), -3]]), newline="")))
    assert rows[0] == ["'=1+1", "'+1", "'-1", "'@x", "'\t=1", "'\n=1", "'\n=1", "'＝1", "a=1", "", "x\n=1"]
    assert rows[1] == ["a,b", "-1.5", "0.123457", "-2", "-3"]
