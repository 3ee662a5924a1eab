"""Sets of pictures as networks see them."""

import numpy as np
import pytest

from dalle_jax.errors import ConfigError
from dalle_jax.evaluation import feature_extractors
from dalle_jax.evaluation.feature_extractors import FeatureExtractor, ImageSet
from dalle_jax.metrics import frechet, inception_score
from dalle_jax.metrics.blur import gaussian_blur

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (23, 12, 12, 3), np.uint8)
OTHERS = RNG.integers(0, 200, (17, 12, 12, 3), np.uint8)


def random_judge(name, width, classes=None):
    rng = np.random.default_rng(width)
    features, logits = rng.normal(size=(432, width)), None if classes is None else rng.normal(size=(432, classes))

    def look(images):
        flat = images.reshape(len(images), -1) / 255
        return np.tanh(flat @ features / 9).astype(np.float32), None if classes is None else flat @ logits

    return Judge(name, width, look, {name: "random"})


JUDGES = [random_judge("one", 5, classes=7), random_judge("two", 4)]


def picture_set(*parts, radii=(0, 1)):
    found = ImageSet(JUDGES, sum(map(len, parts)), radii)
    for part in parts:
        found.add(part)
    return found


def test_a_set_beside_itself():
    drawn, real = picture_set(PICTURES), picture_set(PICTURES[::-1])
    figures = drawn.distances(real) | drawn.precision_recall(real)
    assert figures["fid_one"] == pytest.approx(0, abs=1e-6) and figures["fid_two"] == pytest.approx(0, abs=1e-6)
    assert figures["precision_one"] == figures["recall_two"] == 1
    assert figures.keys() == {
        "fid_one", "inception_score", "inception_score_std", "precision_one", "recall_one",
        "fid_two", "precision_two", "recall_two",
    }  # fmt: skip


@pytest.mark.parametrize("radius", [0, 1])
def test_pieces_are_the_whole_at_every_radius(radius):
    real = picture_set(OTHERS)
    whole, pieces = picture_set(PICTURES), picture_set(PICTURES[:1], PICTURES[1:16], PICTURES[16:])
    assert pieces.distances(real, radius) == pytest.approx(whole.distances(real, radius), rel=1e-9)
    assert pieces.precision_recall(real) == whole.precision_recall(real)


def test_both_sides_are_blurred():
    blurred = [np.asarray(gaussian_blur(x, 1)) for x in (PICTURES, OTHERS)]
    expected = picture_set(blurred[0]).distances(picture_set(blurred[1]))
    found = picture_set(PICTURES).distances(picture_set(OTHERS), 1)
    assert found["fid_two"] == pytest.approx(expected["fid_two"], rel=1e-9)
    assert found["fid_two"] != pytest.approx(picture_set(PICTURES).distances(picture_set(OTHERS))["fid_two"], rel=0.01)


def test_the_figures_are_those_of_the_metrics():
    stats = [frechet.add(frechet.empty(5, "one"), JUDGES[0].look(x)[0]) for x in (PICTURES, OTHERS)]
    found = picture_set(PICTURES).distances(picture_set(OTHERS))
    assert found["fid_one"] == pytest.approx(frechet.distance(*stats), rel=1e-9)
    score = inception_score.add(inception_score.empty(23, 10, 7), JUDGES[0].look(PICTURES)[1], np.arange(23))
    assert found["inception_score"] == pytest.approx(inception_score.compute(score)["inception_score"], rel=1e-9)


def test_an_unknown_resize_is_refused_before_the_weights_are_read():
    with pytest.raises(ConfigError, match="resize='bicubic'"):
        feature_extractors.inception("no such file", "bicubic")
