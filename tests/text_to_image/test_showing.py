"""`show` and `save`: every form of images, captions, numbering, and the absence of a viewer."""

import sys
import types

import numpy as np
import pytest
from PIL import Image

from dalle_jax import save, show
from dalle_jax.data.sources.open import open_source
from dalle_jax.data.sources.source import DataOptions
from dalle_jax.errors import ConfigError, DataError, UserError
from dalle_jax.text_to_image import showing

NOISE = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8, 3), np.uint8)
PILS = [Image.fromarray(image) for image in NOISE[0]]
LISTS = [[Image.fromarray(image) for image in row] for row in NOISE]


@pytest.fixture
def sheets(monkeypatch):
    """The sheets that a viewer is asked to show."""
    seen = []
    monkeypatch.setattr(showing.ImageShow, "show", lambda image: seen.append(np.asarray(image)) or True)
    return seen


def contains(sheet, image):
    """Whether a sheet contains an image, enlarged without smoothing."""
    times = 128 // max(image.shape[:2])
    large = image.repeat(times, 0).repeat(times, 1)
    corners = np.argwhere((sheet == large[0, 0]).all(-1))
    return any(np.array_equal(sheet[y : y + large.shape[0], x : x + large.shape[1]], large) for y, x in corners)


@pytest.mark.parametrize("images", [NOISE[0], PILS, NOISE[0] / 255, iter(NOISE[0]), list(NOISE[0])], ids=range(5))
def test_show_a_row(sheets, images):
    assert show(images) is None
    assert all(contains(sheets[0], image) for image in NOISE[0])
    assert sheets[0].shape[1] == 2 * 20 + 3 * 128 + 2 * 16, "as wide as three images"


@pytest.mark.parametrize("images", [NOISE, LISTS, list(NOISE)], ids=["array", "lists", "arrays"])
def test_show_groups(sheets, images):
    show(images, ["one", "two"])
    assert all(contains(sheets[0], image) for row in NOISE for image in row)
    show(images)
    assert sheets[1].shape[0] < sheets[0].shape[0], "no space for captions that are not given"


def test_one_image_of_any_shape(sheets):
    wide = NOISE[0, 0, :4]
    show(wide)
    assert contains(sheets[0], wide)
    show(wide, "a caption")
    assert sheets[1].shape[0] > sheets[0].shape[0]


def test_a_notebook_shows_the_sheet_below_the_cell(monkeypatch):
    seen = []
    display = types.SimpleNamespace(display=seen.append)
    shell = types.SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(display=display, get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    show(NOISE[0])
    assert len(seen) == 1 and contains(np.asarray(seen[0]), NOISE[0, 2])


def test_a_program_that_imports_ipython_is_no_notebook(monkeypatch, sheets):
    for shell in (None, types.SimpleNamespace(kernel=None), types.SimpleNamespace()):
        monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda found=shell: found))
        show(NOISE[0])
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace())
    show(NOISE[0])
    assert len(sheets) == 4 and not showing.in_notebook()


def test_what_show_rejects(sheets, monkeypatch):
    for wrong in (dict(images=[]), dict(images=NOISE[0], captions=["a"]), dict(images=NOISE, captions=["a"] * 3)):
        with pytest.raises(DataError):
            show(**wrong)
    with pytest.raises(ConfigError, match="columns"):
        show(NOISE[0], columns=0)
    assert not sheets
    monkeypatch.setattr(showing.ImageShow, "show", lambda image: False)
    with pytest.raises(UserError, match="save"):
        show(NOISE[0])


def test_saved_images_are_numbered_and_nothing_is_lost(tmp_path):
    folder = tmp_path / "new" / "folder"
    paths = save(NOISE, folder)
    assert paths == [str(folder / f"{i:04d}.png") for i in range(6)]
    for path, image in zip(paths, NOISE.reshape(6, 8, 8, 3), strict=True):
        np.testing.assert_array_equal(Image.open(path), image)
    (folder / "notes.txt").write_text("mine")
    assert save(PILS[0], str(folder)) == [str(folder / "0006.png")]
    assert sorted(path.name for path in folder.iterdir())[-2:] == ["0006.png", "notes.txt"]


def test_a_saved_folder_with_captions_is_a_data_set(tmp_path):
    save(NOISE, tmp_path, ["a red circle", "a green star"])
    options = DataOptions(source="folder", path=str(tmp_path), train_split="all", eval_split="all")
    captions = sorted(open_source(options, "all").captions())
    assert captions == ["a green star"] * 3 + ["a red circle"] * 3


def test_a_stream_is_saved_as_it_comes(tmp_path):
    def drawn():
        for count, image in enumerate(NOISE[0]):
            assert len(list(tmp_path.glob("*.png"))) == count, "the images before are on disk"
            yield image

    assert len(save(drawn(), tmp_path, "a caption for all")) == 3
    assert len(list(tmp_path.glob("*.txt"))) == 3


@pytest.mark.parametrize("captions", [["a"], ["a"] * 4, []])
def test_captions_must_be_as_many_as_images(tmp_path, captions):
    with pytest.raises(DataError, match=str(len(captions))):
        save(NOISE[0], tmp_path, captions)
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match=str(len(captions))):
        save(iter(NOISE[0]), tmp_path, captions)
    with pytest.raises(DataError):
        save([], tmp_path / "none")
