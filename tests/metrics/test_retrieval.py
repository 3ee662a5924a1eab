"""Retrieval@1 against a count in a loop."""

import numpy as np

from dalle_jax.metrics.retrieval import retrieval


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_retrieval_equals_a_count_in_a_loop():
    rng = np.random.default_rng(0)
    images = unit(rng.normal(size=(23, 4)))
    captions = unit(images + rng.normal(size=(23, 4)) * 0.4)
    text = np.arange(23)[:, None]
    to_text = to_image = 0
    for group in (range(0, 10), range(10, 20)):  # the last three are not a whole group
        for i in group:
            to_text += max(group, key=lambda j: images[i] @ captions[j]) == i
            to_image += max(group, key=lambda j: captions[i] @ images[j]) == i
    metrics = retrieval(images, captions, text, among=10)
    assert 0 < to_text < 20 and 0 < to_image < 20 and to_text != to_image
    assert metrics["image_to_text@1"] == to_text / 20 and metrics["text_to_image@1"] == to_image / 20
    assert metrics["retrieval@1"] == (to_text + to_image) / 40 and metrics["among"] == 10


def test_equal_captions_count_as_one():
    vectors = np.eye(3)
    turned = vectors[[1, 0, 2]]  # the first two images find each other's captions
    assert retrieval(vectors, turned, np.array([[5, 6], [5, 7], [1, 2]]))["retrieval@1"] == 1 / 3
    assert retrieval(vectors, turned, np.array([[5, 6], [5, 6], [1, 2]]))["retrieval@1"] == 1.0


def test_few_examples_are_one_group():
    assert retrieval(np.eye(5), np.eye(5), np.arange(5)[:, None])["among"] == 5
