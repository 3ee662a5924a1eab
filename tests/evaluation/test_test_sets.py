"""The captions and images that an evaluation uses."""

import json

import numpy as np
import pytest
from PIL import Image

from dalle_jax.data.text import TextModel
from dalle_jax.errors import ConfigError, DataError
from dalle_jax.evaluation.test_sets import Protocol, open_test_set

CAPTIONS = [["one", "a photo"], ["two", "deux"], ["damaged", "never"], ["three", "a photo", "trois"], ["four"]]
READABLE = [0, 1, 3, 4]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for i in range(len(CAPTIONS)):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 12, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    (folder / "2.png").write_bytes(b"no image")
    rows = [json.dumps({"file": f"{i}.png", "captions": captions}) for i, captions in enumerate(CAPTIONS)]
    (folder / "captions.jsonl").write_text("\n".join(rows))
    return {"source": "folder", "path": str(folder), "image_size": 8, "augment": "prior"}


def test_the_first_captions(data):
    tests = open_test_set(data, Protocol("all", "first", 3))
    assert tests.captions == ("one", "two", "three")
    assert tests.owners.tolist() == [0, 1, 2] and tests.indices.tolist() == READABLE[:3]
    pixels = np.random.default_rng(3).integers(0, 256, (8, 12, 3), np.uint8)
    np.testing.assert_array_equal(tests.images([2, 0])[0], pixels[:, 2:10])  # the centre, not augmented


def test_drawn_captions_are_of_different_images(data):
    orders = set()
    for seed in range(40):
        tests = open_test_set(data, Protocol("all", "drawn", 3, seed))
        assert len(set(tests.indices)) == 3 and tests.owners.tolist() == [0, 1, 2]
        for caption, index in zip(tests.captions, tests.indices):
            assert caption in CAPTIONS[index]
        assert open_test_set(data, Protocol("all", "drawn", 3, seed)).captions == tests.captions
        orders.add(tests.captions)
    assert len(orders) > 20
    assert {caption for order in orders for caption in order} == {c for i in READABLE for c in CAPTIONS[i]}


def test_unique_captions_with_all_images(data):
    tests = open_test_set(data, Protocol("all", "unique"))
    assert tests.captions == ("one", "a photo", "two", "deux", "three", "trois", "four")
    assert tests.owners.tolist() == [0, 0, 1, 1, 2, 2, 3]
    assert tests.indices.tolist() == READABLE
    few = open_test_set(data, Protocol("all", "unique", 3))
    assert few.captions == tests.captions[:3] and few.indices.tolist() == READABLE


def test_the_description_in_the_report(data):
    described = open_test_set(data, Protocol("all", "first", 3)).describe()
    assert described["captions"] == "3, first" and described["real_images"] == 3 and described["image_size"] == 8
    # printf 'one\ntwo\nthree' | sha256sum
    assert described["captions_sha256"] == "058053d87c818d699cde0f00d670bca0e1c6ad857caa9758ea6a556d7c64fcee"
    other = open_test_set(data, Protocol("all", "unique", 3)).describe()
    assert other["captions_sha256"] != described["captions_sha256"] and len(other["captions_sha256"]) == 64


def test_another_image_size(data):
    assert open_test_set(data, Protocol("all"), image_size=4).images([0]).shape == (1, 4, 4, 3)


def test_invalid_protocols_are_rejected(data):
    with pytest.raises(DataError, match="config.count"):
        open_test_set(data, Protocol("all", "first", 99))
    with pytest.raises(ConfigError, match="config.captions"):
        Protocol("all", "all")
    with pytest.raises(ConfigError, match="config.count"):
        Protocol("all", count=0)


@pytest.mark.parametrize("captions", ["first", "unique"])
def test_captions_that_a_text_model_cannot_read_are_left_out(data, captions):
    model = TextModel.train(["w n"] * 3, vocab_size=40)
    assert open_test_set(data, Protocol("all", captions), text_models=[model]).captions == ("one", "two")
