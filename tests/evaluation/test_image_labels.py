"""Labels of the embedded data, and class folders."""

import numpy as np

from dalle_jax.data.builders.emoji_captions import names
from dalle_jax.data.builders.shapes_captions.scenes import Object, Scene
from dalle_jax.data.sources.folder.class_folders import ClassFolders
from dalle_jax.data.sources.record import Record
from dalle_jax.evaluation.image_labels import labels_of

NONE = ClassFolders(["a/1.png"])


def record(name="", **extra):
    return Record(np.zeros((1, 1, 3), np.uint8), (), name, extra)


def test_shapes_have_what_their_caption_states():
    scene = Scene((Object("red", "circle"), Object("blue", "square", "small")), "above", None)
    labels = labels_of(record(scene=scene.to_json()), NONE)
    assert labels == {
        "objects": "2", "relation": "above", "background": None, "first shape": "circle", "first color": "red",
        "first size": None, "second shape": "square", "second color": "blue", "second size": "small",
    }  # fmt: skip
    assert "second shape" not in labels_of(record(scene=Scene((Object("red", "circle"),)).to_json()), NONE)


def test_emoji_have_kinds():
    def of(sequence, name):
        item = names.parse(sequence, name)
        extra = {key: getattr(item, key) for key in ("name", "sequence", "role", "gender", "tone")}
        return labels_of(Record(np.zeros((1, 1, 3), np.uint8), (), "", extra), NONE)

    assert of("\U0001f1e7\U0001f1f7", ":Brazil:")["kind"] == "flag"
    assert of("x", ":keycap_7:")["kind"] == "keycap"
    firefighter = of("x", ":woman_firefighter_dark_skin_tone:")
    assert firefighter == {"kind": "person", "gender": "woman", "tone": "dark"}
    assert of("x", ":waving_hand_light_skin_tone:") == {"kind": "hand or body", "gender": None, "tone": "light"}
    assert of("x", ":red_apple:") == {"kind": "thing", "gender": None, "tone": None}


def test_folders_below_splits_are_classes():
    images = ["train/cat/1.png", "train/dog/a/2.png", "val/cat/3.png", "train/4.png"]
    folders = ClassFolders(images)
    assert [folders.class_of(name) for name in images] == ["cat", "dog", "cat", None]
    assert labels_of(record("val/dog/9.png"), folders) == {"class": "dog"}


def test_folders_at_the_top_are_classes_without_splits():
    images = ["set/cat/1.png", "set/dog/2.png", "set/dog/test/3.png"]
    folders = ClassFolders(images)
    assert [folders.class_of(name) for name in images] == ["cat", "dog", "dog"]
    assert ClassFolders(["1.png", "cat/2.png"]).class_of("1.png") is None
