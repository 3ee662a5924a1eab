"""experiments/results/weights: the weights that README's first example loads."""

import pathlib

import numpy as np
import pytest

from dalle_jax import TextToImage
from dalle_jax.checkpoints.exported import Exported
from dalle_jax.data.builders.shapes_captions.scenes import Object, Scene
from dalle_jax.data.known_captions import CAPTIONS
from dalle_jax.distributed.mesh import make_mesh
from dalle_jax.metrics.shapes import read_scene, right_captions

ROOT = pathlib.Path(__file__).parents[2] / "experiments" / "results" / "weights"
SHAPES = ROOT / "shapes"
MOST_BYTES = 5_000_000
ASKED = {
    "a red circle above a blue square": Scene((Object("red", "circle"), Object("blue", "square")), "above"),
    "a green triangle left of an orange circle on a white background": Scene(
        (Object("green", "triangle"), Object("orange", "circle")), "left of", "white"
    ),
    "a purple diamond left of a yellow cross on a gray background": Scene(
        (Object("purple", "diamond"), Object("yellow", "cross")), "left of", "gray"
    ),
    "a large yellow triangle above a large red cross, a black background": Scene(
        (Object("yellow", "triangle", "large"), Object("red", "cross", "large")), "above", "black"
    ),
}


def test_the_page_offers_these_captions():
    assert set(ASKED) == set(CAPTIONS["shapes_captions"])


@pytest.fixture(scope="module")
def model():
    return TextToImage.load(str(SHAPES), rows_at_once=8, mesh=make_mesh(data=1))


def test_all_weights_together_are_small():
    files = [path for path in ROOT.rglob("*") if path.is_file()]
    assert len(files) > 5 and sum(path.stat().st_size for path in files) <= MOST_BYTES


def test_every_export_is_complete_and_has_a_card():
    for folder in ROOT.iterdir():
        export = Exported(folder)
        export.check_files()
        card = (folder / "README.md").read_text()
        assert f"experiments/results/weights/{folder.name}" in card and "Metrics" in card and "Licence" in card
        for name, entry in export.files.items():
            assert (folder / name).stat().st_size == entry["bytes"], name


def test_captions_are_drawn_right(model):
    """CLIP is stored too, so that the best of a few candidates is drawn."""
    drawn = model.generate(list(ASKED), candidates=8, keep=1, seed=0, temperature=0.5)[:, 0]
    right = right_captions(drawn, list(ASKED.values()))
    assert right.all(), [caption for caption, well in zip(ASKED, right) if not well]


def test_an_extension_draws_what_its_caption_says(model):
    left, right = (
        "a purple diamond left of a yellow cross on a gray background",
        "a yellow cross left of a red triangle",
    )
    image = model.generate(left, candidates=8, keep=1, seed=0, temperature=0.5)[0]
    wide = model.outpaint(image, (0, 0, 0, 16), f"{right} on a gray background", seed=0, temperature=0.5)[0]
    np.testing.assert_array_equal(wide[:, :32], image)
    objects = read_scene(wide[:, 16:]).objects
    assert [(each.color, each.shape) for each in objects] == [("yellow", "cross"), ("red", "triangle")]
