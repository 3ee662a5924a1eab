"""Linear classifiers: they find a planted feature, stay at chance without one, and are at the minimum of their loss."""

import numpy as np
import pytest

from dalle_jax.errors import DataError
from dalle_jax.metrics import linear_classifier

CLASSES, WIDTH = 3, 8


def rows(count, seed, planted):
    """Features of random numbers of very different scales, one of which may hold the class; and the classes."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count)
    features = rng.normal(size=(count, WIDTH)) + 3
    if planted:
        features[:, 2] = (labels == 1) + 0.1 * rng.normal(size=count)
        features[:, 5] = (labels == 2) + 0.1 * rng.normal(size=count)
    return (features * 10.0 ** np.arange(-4, 4)[None]).astype(np.float32), labels


def accuracy(planted):
    features, labels = rows(400, 0, planted)
    test_features, test_labels = rows(400, 1, planted)
    names = np.array(["circle", "cross", "square"])
    return linear_classifier.accuracy(features, names[labels], test_features, names[test_labels])


def test_a_planted_feature_is_found():
    found = accuracy(planted=True)
    assert found.accuracy > 0.97 and found.chance == pytest.approx(1 / CLASSES, abs=0.08)


def test_without_a_feature_it_stays_at_chance():
    found = accuracy(planted=False)
    assert found.accuracy == pytest.approx(1 / CLASSES, abs=0.08)


def test_the_classifier_is_at_the_minimum_of_its_loss():
    """The gradient of mean cross-entropy + ½ λ ‖W‖² vanishes there, in float64 and without JAX."""
    features, labels = rows(200, 0, planted=True)
    penalty = 1e-2
    found = linear_classifier.fit(features, labels, CLASSES, penalty)
    inputs = (features.astype(np.float64) - features.mean(0)) / features.std(0)
    inputs = np.concatenate([inputs, np.ones((200, 1))], axis=1)
    logits = inputs @ found.weights
    odds = np.exp(logits - logits.max(1, keepdims=True))
    gradient = inputs.T @ (odds / odds.sum(1, keepdims=True) - np.eye(CLASSES)[labels]) / 200
    gradient[:-1] += penalty * found.weights[:-1]
    assert np.abs(gradient).max() < 1e-4 < np.abs(found.weights).max()


def test_a_class_that_only_the_test_has_counts_as_wrong():
    features, labels = rows(200, 0, planted=True)
    names = np.array(["a", "b", "c"])
    whole = linear_classifier.accuracy(features, names[labels], features, names[labels])
    some = linear_classifier.accuracy(features[labels < 2], names[labels[labels < 2]], features, names[labels])
    assert some.accuracy == pytest.approx(np.mean(labels < 2), abs=0.02) and whole.accuracy > 0.97


def test_one_class_is_an_error():
    features, labels = rows(50, 0, planted=True)
    with pytest.raises(DataError, match="50"):
        linear_classifier.accuracy(features, labels * 0, features, labels)
