"""Sets of images under feature extractors."""

import jax
import numpy as np
import pytest

from dalle_jax.errors import ConfigError
from dalle_jax.evaluation import feature_extractors
from dalle_jax.evaluation.feature_extractors import FeatureExtractor, ImageSet
from dalle_jax.metrics import frechet, inception_score
from dalle_jax.metrics.blur import gaussian_blur

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (23, 12, 12, 3), np.uint8)
OTHERS = RNG.integers(0, 200, (17, 12, 12, 3), np.uint8)


def random_extractor(name, width, classes=None):
    rng = np.random.default_rng(width)
    features, logits = rng.normal(size=(432, width)), None if classes is None else rng.normal(size=(432, classes))

    def network(images):
        flat = np.asarray(images).reshape(len(images), -1) / 255
        return np.tanh(flat @ features / 9).astype(np.float32), None if classes is None else flat @ logits

    return FeatureExtractor(name, width, network, {name: "random"})


EXTRACTORS = [random_extractor("one", 5, classes=7), random_extractor("two", 4)]


def image_set(*parts, radii=(0, 1)):
    found = ImageSet(EXTRACTORS, sum(map(len, parts)), radii)
    for part in parts:
        found.add(part)
    return found


def test_a_set_compared_with_itself():
    drawn, real = image_set(IMAGES), image_set(IMAGES[::-1])
    metrics = drawn.distances(real) | drawn.precision_recall(real)
    assert metrics["fid_one"] == pytest.approx(0, abs=1e-6) and metrics["fid_two"] == pytest.approx(0, abs=1e-6)
    assert metrics["precision_one"] == metrics["recall_two"] == 1
    assert metrics.keys() == {
        "fid_one", "inception_score", "inception_score_std", "precision_one", "recall_one",
        "fid_two", "precision_two", "recall_two",
    }  # fmt: skip


@pytest.mark.parametrize("radius", [0, 1])
def test_adding_in_pieces_equals_adding_at_once(radius):
    real = image_set(OTHERS)
    whole, pieces = image_set(IMAGES), image_set(IMAGES[:1], IMAGES[1:16], IMAGES[16:])
    assert pieces.distances(real, radius) == pytest.approx(whole.distances(real, radius), rel=1e-9)
    assert pieces.precision_recall(real) == whole.precision_recall(real)


def test_both_sides_are_blurred():
    blurred = [np.asarray(gaussian_blur(x, 1)) for x in (IMAGES, OTHERS)]
    expected = image_set(blurred[0]).distances(image_set(blurred[1]))
    found = image_set(IMAGES).distances(image_set(OTHERS), 1)
    assert found["fid_two"] == pytest.approx(expected["fid_two"], rel=1e-9)
    assert found["fid_two"] != pytest.approx(image_set(IMAGES).distances(image_set(OTHERS))["fid_two"], rel=0.01)


def test_values_equal_those_of_the_metrics_modules():
    stats = [frechet.add(frechet.empty(5, "one"), EXTRACTORS[0].extract(x)[0][0]) for x in (IMAGES, OTHERS)]
    found = image_set(IMAGES).distances(image_set(OTHERS))
    assert found["fid_one"] == pytest.approx(frechet.distance(*stats), rel=1e-9)
    score = inception_score.add(inception_score.empty(23, 10, 7), EXTRACTORS[0].extract(IMAGES)[0][1], np.arange(23))
    assert found["inception_score"] == pytest.approx(inception_score.compute(score)["inception_score"], rel=1e-9)


@pytest.mark.parametrize("rows_at_once", [8, 23, 64])
def test_images_travel_to_the_device_once(monkeypatch, rows_at_once):
    """As uint8, whatever the number of radii. They are blurred there: the network never sees images of the host."""
    blurred, seen, blur = [], [], feature_extractors.gaussian_blur

    def on_device(images, radius):
        assert isinstance(images, jax.Array) and images.dtype == np.uint8
        blurred.append(images)
        return blur(images, radius)

    def network(images):
        assert isinstance(images, jax.Array) and images.dtype == np.uint8
        seen.append(len(images))
        return images.reshape(len(images), -1)[:, :7].astype(np.float32), None

    monkeypatch.setattr(feature_extractors, "gaussian_blur", on_device)
    extractor = FeatureExtractor("test", 7, network, {}, rows_at_once)
    radii = (0, 1, 2.5)
    for radius, (features, logits) in zip(radii, extractor.extract(IMAGES, radii)):
        expected = np.asarray(gaussian_blur(IMAGES, radius)).reshape(23, -1)[:, :7]
        np.testing.assert_array_equal(features, expected)
        assert logits is None
    chunks = -(-23 // rows_at_once)
    assert seen == [rows_at_once] * 3 * chunks
    assert len({id(images) for images in blurred}) == chunks


def test_the_example_in_the_module_docstring_runs():
    """It calls only functions and methods that exist."""
    lines = feature_extractors.__doc__.splitlines()
    example = "\n".join(line.strip() for line in lines if line.startswith("    "))
    assert example.count("\n") == 5
    names = {"ImageSet": ImageSet, "path": None, "scorer": None, "a": IMAGES, "b": OTHERS}
    exec(example, names | {"inception": lambda _: EXTRACTORS[0], "clip": lambda _: EXTRACTORS[1]})


def test_an_unknown_resize_is_rejected_before_the_weights_are_read():
    with pytest.raises(ConfigError, match="bicubic"):
        feature_extractors.inception("no such file", "bicubic")
