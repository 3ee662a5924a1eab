"""The embedded shapes: held-out combinations, captions, and the TFDS builder without TensorFlow."""

import dataclasses
import itertools
import re
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from dalle_jax.data.builders.shapes_captions import drawing, scenes
from dalle_jax.data.builders.shapes_captions.scenes import Object, Scene
from dalle_jax.data.builders.shapes_captions.shapes_captions_dataset_builder import Builder, make_example


def draw_scenes(count, held_out):
    return [scenes.draw_scene(np.random.default_rng([5, i]), held_out=held_out) for i in range(count)]


def combination(scene):
    return tuple((item.color, item.shape) for item in scene.objects), scene.relation


def test_training_and_heldout_share_no_combination():
    seen = [shown for shown, _ in draw_scenes(3000, False)]
    unseen = [shown for shown, _ in draw_scenes(1000, True)]
    assert not {combination(scene) for scene in seen} & {combination(scene) for scene in unseen}
    assert not any(scenes.is_held_out(scene) for scene in seen)
    assert all(scenes.is_held_out(scene) for scene in unseen)


def test_heldout_scenes_have_two_objects_and_training_scenes_mostly():
    assert all(len(shown.objects) == 2 for shown, _ in draw_scenes(500, True))
    assert 0.15 < np.mean([len(shown.objects) == 1 for shown, _ in draw_scenes(1000, False)]) < 0.25


def test_every_attribute_value_is_seen_in_every_role():
    seen = [shown for shown, _ in draw_scenes(3000, False)]
    for relation in (None, *scenes.RELATIONS):
        for index in range(1 if relation is None else 2):
            items = [scene.objects[index] for scene in seen if scene.relation == relation]
            assert {item.color for item in items} == set(scenes.COLORS)
            assert {item.shape for item in items} == set(scenes.SHAPES)
            assert {item.size for item in items} == set(scenes.SIZES)
    assert {scene.background for scene in seen} == set(scenes.BACKGROUNDS)


def test_every_color_of_every_shape_is_seen_in_every_place():
    seen = [shown for shown, _ in draw_scenes(8000, False)]
    for relation, index in ((None, 0), ("above", 0), ("above", 1), ("left of", 0), ("left of", 1)):
        pairs = {
            (scene.objects[index].color, scene.objects[index].shape) for scene in seen if scene.relation == relation
        }
        assert pairs == set(itertools.product(scenes.COLORS, scenes.SHAPES))


def test_a_tenth_of_the_combinations_is_held_out():
    pairs = list(itertools.product(scenes.COLORS, scenes.SHAPES))
    for relation in scenes.RELATIONS:
        combinations = [Scene((Object(*a), Object(*b)), relation) for a, b in itertools.product(pairs, pairs)]
        assert 0.08 < np.mean([scenes.is_held_out(scene) for scene in combinations]) < 0.12


def read_caption(caption):
    """Parses the scene that a caption states, independently of the code that wrote it."""
    words = re.sub(r"[^a-z ]", " ", caption).split()
    background = next((a for a, b in itertools.pairwise(words) if b == "background"), None)
    objects = []
    for position, word in enumerate(words):
        if word in scenes.SHAPES:
            size = words[position - 2] if position > 1 and words[position - 2] in scenes.SIZES else None
            objects.append(Object(words[position - 1], word, size))
    inverse = "below" in words or "right" in words
    relation = None
    if len(objects) == 2:
        relation = "above" if "above" in words or "below" in words else "left of"
    return Scene(tuple(objects[::-1] if inverse else objects), relation, background)


def test_captions_state_exactly_the_stored_scene():
    captions, all_stated = set(), []
    for index in range(1500):
        rng = np.random.default_rng([6, index])
        shown, stated = scenes.draw_scene(rng, held_out=index % 2 == 0)
        caption = scenes.write_caption(rng, stated)
        captions.add(caption)
        all_stated.append(stated)
        assert read_caption(caption) == stated
        for written, drawn in zip(stated.objects, shown.objects):
            assert written in (drawn, dataclasses.replace(drawn, size=None))
            assert written.size is not None or drawn.size == "large"
        assert stated.relation == shown.relation and stated.background in (None, shown.background)
    assert len(captions) > 1000
    assert 0.3 < np.mean([scene.objects[0].size is None for scene in all_stated]) < 0.5
    assert 0.1 < np.mean([scene.background is None for scene in all_stated]) < 0.3
    for word in ("below", "right of", "to the left of"):
        assert any(word in caption for caption in captions)


def test_scene_json_round_trip():
    for _, stated in draw_scenes(50, False):
        assert Scene.from_json(stated.to_json()) == stated == Scene.from_json(stated.to_json().encode())


def test_an_example_depends_on_seed_split_and_index_alone():
    image, caption, _ = make_example(0, "train", 3, 32)
    again, same, _ = make_example(0, "train", 3, 32)
    np.testing.assert_array_equal(image, again)
    assert caption == same
    for other in ((1, "train", 3), (0, "validation", 3), (0, "train", 4)):
        assert not np.array_equal(image, make_example(*other, 32)[0])


def test_colors_are_far_apart():
    palette = np.array([*scenes.COLORS.values(), *scenes.BACKGROUNDS.values()], float)
    distances = np.linalg.norm(palette[:, None] - palette, axis=-1)
    assert distances[~np.eye(len(palette), dtype=bool)].min() > 80


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_coverage_is_antialiased_and_keeps_its_area(shape):
    areas = {"circle": np.pi, "square": 1.8**2, "triangle": 1.9, "diamond": 2.0, "cross": 2 * 1.44 - 0.72**2}
    mask = drawing.coverage(shape, 0.47, 0.52, 0.3, 32)
    assert mask.dtype == np.float32 and mask.min() == 0.0 and mask.max() == 1.0
    assert ((mask > 0) & (mask < 1)).any()
    np.testing.assert_allclose(mask.mean(), areas[shape] * 0.3**2, rtol=0.03)


def test_large_objects_fill_their_part_of_the_image():
    for shown, _ in draw_scenes(200, False):
        if all(item.size == "large" for item in shown.objects):
            background = np.array(scenes.BACKGROUNDS[shown.background])
            image = drawing.draw(shown, 32)
            rows, columns = np.nonzero((image != background).any(-1))
            extent = (np.ptp(rows) + 1, np.ptp(columns) + 1)
            assert max(extent) >= 26
            if len(shown.objects) == 2:
                assert min(extent) >= 13


def test_builder_needs_no_tensorflow(tmp_path):
    options = {"num_train": 20, "num_validation": 4, "num_heldout": 6}
    builder = tfds.builder("shapes_captions", data_dir=tmp_path, file_format="array_record", **options)
    builder.download_and_prepare()
    assert {name: split.num_examples for name, split in builder.info.splits.items()} == {
        "train": 20,
        "validation": 4,
        "heldout": 6,
    }
    for split in ("train", "validation", "heldout"):
        source = builder.as_data_source(split)
        for index in range(len(source)):
            image, caption, stated = make_example(0, split, index, 32)
            example = source[index]
            np.testing.assert_array_equal(example["image"], image)
            assert example["caption"].decode() == caption
            assert Scene.from_json(example["scene"]) == stated
            assert scenes.is_held_out(stated) == (split == "heldout")
    assert "tensorflow" not in sys.modules


def test_other_options_have_other_paths_on_disk(tmp_path):
    other = {"image_size": 64, "num_train": 7, "num_validation": 7, "num_heldout": 7, "seed": 1}
    options = [{}, *({key: value} for key, value in other.items())]
    assert len({str(Builder(data_dir=tmp_path, **each).data_path) for each in options}) == 6
