"""The reader of shapes: right on real images, robust to a dVAE's artefacts, strict with smears."""

import dataclasses

import numpy as np
import PIL.Image
import PIL.ImageFilter
import pytest

from dalle_jax.data.builders.shapes_captions import drawing
from dalle_jax.data.builders.shapes_captions.scenes import BACKGROUNDS, COLORS, SHAPES, Object, Scene
from dalle_jax.data.builders.shapes_captions.shapes_captions_dataset_builder import make_example
from dalle_jax.metrics import shapes


def examples(count, image_size=32):
    made = [make_example(3, ("train", "heldout")[i % 2], i, image_size) for i in range(count)]
    return np.stack([image for image, _, _ in made]), [stated for _, _, stated in made]


def render(scene, image_size=32):
    return drawing.draw(scene, image_size)


def disturb(images, blur, noise):
    blurred = [PIL.Image.fromarray(image).filter(PIL.ImageFilter.GaussianBlur(blur)) for image in images]
    noisy = np.stack(blurred) + np.random.default_rng(0).normal(0, noise, images.shape)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


def test_real_images_match_their_captions():
    scores = shapes.score(*examples(512))
    assert scores["caption_accuracy"] >= 0.99
    assert all(scores[name] >= 0.99 for name in ("attribute_accuracy", *shapes.ATTRIBUTES))


@pytest.mark.parametrize("image_size", [40, 48, 64])
def test_other_image_sizes(image_size):
    assert shapes.score(*examples(128, image_size))["caption_accuracy"] >= 0.99


@pytest.mark.parametrize("blur, noise", [(0.0, 8), (0.7, 8), (0.9, 10)])
def test_images_with_blur_and_noise_are_readable(blur, noise):
    images, scenes = examples(256)
    assert shapes.score(disturb(images, blur, noise), scenes)["caption_accuracy"] >= 0.97


def test_every_color_reads_on_every_background():
    scenes = [
        Scene((Object(color, shape, "small"),), None, background)
        for background in BACKGROUNDS
        for color in COLORS
        for shape in SHAPES
    ]
    assert shapes.read_scenes(np.stack([render(scene) for scene in scenes])) == scenes


def test_touching_objects_of_one_color_are_two():
    for relation in ("above", "left of"):
        scene = Scene((Object("red", "square", "large"), Object("red", "square", "large")), relation, "white")
        assert shapes.read_scene(render(scene)) == scene


def faint_circle():
    mask = drawing.coverage("circle", 0.5, 0.5, 0.45, 32)[..., None]
    return np.rint(128 + mask * [30.0, 0.0, 0.0]).astype(np.uint8)


@pytest.mark.parametrize(
    "image",
    [
        np.full((32, 32, 3), 128, np.uint8),
        np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8),
        np.broadcast_to(np.linspace(0, 255, 32).astype(np.uint8)[:, None], (32, 32, 3)),
        faint_circle(),
    ],
    ids=["blank", "noise", "stripes", "faint"],
)
def test_an_image_without_an_object_is_read_as_empty(image):
    assert shapes.read_scene(image).objects == ()


BASE = Scene((Object("red", "circle", "large"), Object("blue", "square", "small")), "above", "gray")


def change(index, **attributes):
    objects = list(BASE.objects)
    objects[index] = dataclasses.replace(objects[index], **attributes)
    return dataclasses.replace(BASE, objects=tuple(objects))


@pytest.mark.parametrize(
    "shown, wrong",
    [
        (BASE, {}),
        (change(0, shape="diamond"), {"shape": 0.5}),
        (change(1, color="green"), {"color": 0.5}),
        (change(1, size="large"), {"size": 0.5}),
        (dataclasses.replace(BASE, relation="left of"), {"relation": 0.0}),
        (dataclasses.replace(BASE, objects=BASE.objects[::-1]), {"relation": 0.0}),
        (dataclasses.replace(BASE, background="white"), {"background": 0.0}),
        (Scene(BASE.objects[:1], None, "gray"), {"shape": 0.5, "color": 0.5, "size": 0.5, "relation": 0.0}),
    ],
    ids=["right", "shape", "color", "size", "relation", "places", "background", "missing"],
)
def test_each_mistake_counts_against_its_attribute(shown, wrong):
    scores = shapes.score(render(shown)[None], [BASE])
    for name in shapes.ATTRIBUTES:
        assert scores[name] == wrong.get(name, 1.0), name
    assert scores["caption_accuracy"] == float(not wrong)
    stated = {"shape": 2, "color": 2, "size": 2, "relation": 1, "background": 1}
    assert scores["attribute_accuracy"] == pytest.approx(
        sum(scores[name] * count for name, count in stated.items()) / sum(stated.values())
    )


def test_a_second_object_spoils_a_caption_with_one():
    scores = shapes.score(render(BASE)[None], [Scene((Object("blue", "square"),))])
    assert scores["caption_accuracy"] == 0.0
    assert scores["shape"] == scores["color"] == 1.0


def test_unstated_attributes_are_not_scored():
    open_scene = Scene(tuple(dataclasses.replace(item, size=None) for item in BASE.objects), "above", None)
    scores = shapes.score(render(BASE)[None], [open_scene])
    assert scores["caption_accuracy"] == scores["attribute_accuracy"] == 1.0
    assert np.isnan(scores["size"]) and np.isnan(scores["background"])


def test_chance_is_low_for_shuffled_captions():
    images, scenes = examples(256)
    assert shapes.score(images, scenes[1:] + scenes[:1])["caption_accuracy"] < 0.03


def test_invalid_inputs_are_rejected():
    with pytest.raises(ValueError, match="uint8"):
        shapes.read_scenes(np.zeros((1, 32, 32, 3), np.float32))
    with pytest.raises(ValueError, match="2 images"):
        shapes.score(np.zeros((2, 32, 32, 3), np.uint8), [BASE])
