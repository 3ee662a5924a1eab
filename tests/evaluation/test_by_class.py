"""Measuring a prior of classes, against values computed by hand. The prior and CLIP have random weights."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image
from small_evaluation import make_class_model, make_model, open_classes, write_class_folders
from test_feature_extractors import EXTRACTORS, IMAGES, OTHERS, image_set

from dalle_jax.data.sources.source import DataOptions
from dalle_jax.errors import ConfigError, DataError
from dalle_jax.evaluation.by_class import ClassMetrics, ClassProtocol, measure_classes
from dalle_jax.evaluation.measure import Model
from dalle_jax.evaluation.reference import read_images
from dalle_jax.metrics import frechet, linear_classifier, precision_recall
from dalle_jax.priors.sampling import SamplingOptions

PROTOCOL = ClassProtocol(count=11, seed=3)
SAMPLING = SamplingOptions(temperature=0.7)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Draws three classes, two images at once."""
    return make_class_model(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def reference(model, tmp_path_factory):
    """Twelve images of noise in class folders."""
    folder = tmp_path_factory.mktemp("images")
    write_class_folders(folder)
    return open_classes(folder, model)


@pytest.fixture(scope="module")
def measured(model, reference):
    return measure_classes({"maskgit": Model(model, SAMPLING)}, PROTOCOL, ClassMetrics(classifier=True), reference)


def real_images(reference):
    return np.concatenate(list(reference.batches(range(12), 5)))


def drawn_images(model):
    """Eleven images, of the classes in turn, as `generate` draws them."""
    each = model.generate([f"class: {number}" for number in range(3)], n=4, seed=3, temperature=0.7)
    return each.swapaxes(0, 1).reshape(12, *each.shape[2:])[:11]


def test_real_images_and_their_classes(reference):
    assert reference.count == 12, "the damaged image is left out"
    np.testing.assert_array_equal(reference.labels, np.repeat([0, 1, 2], 4))
    names = [reference.images.source.without_image(i).name for i in reference.images.indices]
    numbers = [int(name.split("/")[1].split(".")[0]) for name in names]
    expected = [np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8) for i in numbers]
    np.testing.assert_array_equal(real_images(reference), expected)


def test_balanced_classes_as_generate_draws_them(measured, model):
    (name, shown), drawn = measured.columns[0], drawn_images(model)
    assert name == "maskgit"
    np.testing.assert_array_equal(shown, drawn)
    assert len(np.unique(drawn, axis=0)) == 11, "images of a class differ"


def test_metrics_are_those_of_the_features(measured, model, reference):
    found = measured.metrics["maskgit"]
    features = [model.scorer.image_features(images) for images in (real_images(reference), drawn_images(model))]
    real, drawn = (frechet.add(frechet.empty(6, "clip"), x) for x in features)
    assert found["fid_clip"] == pytest.approx(frechet.distance(real, drawn), rel=1e-4)
    points = [precision_recall.add(precision_recall.empty(6, "clip"), x) for x in features]
    assert {name: found[name] for name in ("precision_clip", "recall_clip")} == precision_recall.compute(*points)
    trained = linear_classifier.accuracy(features[1], np.arange(11) % 3, features[0], reference.labels, seed=3)
    assert found["classifier_accuracy_clip"] == trained.accuracy
    assert found["steps"] == 3 and found["seconds_per_image"] > 0
    protocol = measured.metrics["protocol"]
    assert protocol["captions"].startswith("11 images of 3 classes") and protocol["real_images"] == 12


def test_stored_statistics_take_the_place_of_computed_ones():
    """The distance is that of the same features. Precision and recall stay those of the images."""
    real, drawn, other = image_set(IMAGES), image_set(OTHERS), image_set(OTHERS)
    features = EXTRACTORS[0].extract(IMAGES)[0][0].astype(np.float64)
    stored = frechet.stored(features.mean(0), np.cov(features, rowvar=False), "one")
    replaced = other.with_statistics(stored)
    assert drawn.distances(replaced)["fid_one"] == pytest.approx(drawn.distances(real)["fid_one"], rel=1e-6)
    assert drawn.distances(replaced)["fid_two"] == pytest.approx(0, abs=1e-6)
    assert drawn.distances(other)["fid_one"] == pytest.approx(0, abs=1e-6), "the first set stays as it was"
    assert drawn.precision_recall(replaced) == drawn.precision_recall(other)


@pytest.mark.parametrize("case, token", [
    ("no extractor", "metrics.inception"), ("captions", "data.condition=label"), ("no labels", "metrics.classifier"),
    ("sampling", "order"), ("hosts", "config.count"),
])  # fmt: skip
def test_rejected_before_anything_is_drawn(case, token, model, reference, tmp_path, monkeypatch):
    monkeypatch.setattr(type(model), "decode", lambda *_: pytest.fail("drawn before the check"))
    sampling, options = SAMPLING, ClassMetrics(classifier=case == "no labels")
    if case == "no extractor":
        model = dataclasses.replace(model, scorer=None)
    elif case == "captions":
        model = make_model(tmp_path)
    elif case == "no labels":
        reference = dataclasses.replace(reference, labels=None)
    elif case == "hosts":
        monkeypatch.setattr(jax, "process_count", lambda: PROTOCOL.count + 1)
    else:
        sampling = SamplingOptions(order="upwards")
    with pytest.raises(ConfigError, match=token):
        measure_classes({"maskgit": Model(model, sampling)}, PROTOCOL, options, reference)


def test_images_without_a_class(model, reference, tmp_path):
    (tmp_path / "unknown").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "unknown" / "a.png")
    data = dict(source="folder", path=str(tmp_path), condition="label", caption_from="folder_names", image_size=16)
    assert read_images(DataOptions(**data), "all", None).labels is None
    with pytest.raises(DataError, match="metrics.classifier"):
        read_images(DataOptions(**data), "all", model.text_model)
