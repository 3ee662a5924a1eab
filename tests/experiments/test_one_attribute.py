"""The candidates of experiments/one_attribute.py: images with exchanged colours and shapes are found and compared."""

import dataclasses
import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest

from dalle_jax.data.builders.shapes_captions import drawing
from dalle_jax.data.builders.shapes_captions.scenes import Object, Scene

PATH = Path(__file__).parents[2] / "experiments" / "one_attribute.py"
SCENE = Scene((Object("red", "circle", "large"), Object("blue", "square", "large")), "above", "white")


@pytest.fixture(scope="module")
def module():
    spec = importlib.util.spec_from_file_location("one_attribute", PATH)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_exchanged_candidates_are_counted_and_compared(module):
    kinds = [SCENE, module.exchange(SCENE, "color"), module.exchange(SCENE, "shape")]
    right, colors, shapes = (drawing.draw(scene, 32) for scene in kinds)
    images = np.stack([[right, colors, colors, shapes], [right, shapes, right, shapes], [shapes] * 4])
    scores = np.array([[0.5, 0.4, 0.6, 0.1], [0.5, 0.6, 0.7, 0.8], [0.1, 0.2, 0.3, 0.4]])
    one = dataclasses.replace(SCENE, objects=SCENE.objects[:1], relation=None)
    found = module.measure_candidates(images, scores, [SCENE] * 3)
    assert found["color"] == {
        "candidates": 12, "exchanged": 2, "captions_with_both": 1, "best_is_exchanged": 1, "prefers_right": 0.5,
    }  # fmt: skip
    assert found["shape"] == {
        "candidates": 12, "exchanged": 7, "captions_with_both": 2, "best_is_exchanged": 2,
        "prefers_right": pytest.approx((1 + 1 / 4) / 2),
    }  # fmt: skip
    assert math.isnan(module.measure_candidates(images[:1], scores[:1], [one])["color"]["prefers_right"])
