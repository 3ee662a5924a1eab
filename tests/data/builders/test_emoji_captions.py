"""Emoji: their names, the splits, drawing with a font, and the TFDS builder without TensorFlow."""

import itertools
import sys

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds

from dalle_jax.data.builders.emoji_captions import drawing, names
from dalle_jax.data.builders.emoji_captions.emoji_captions_dataset_builder import Builder
from dalle_jax.errors import DataError

ALL = names.all_emoji()
BY_NAME = {item.name: item for item in ALL}
ALIKE = [item for item in names.split_emoji(ALL, (), seed=0)["validation"] if item.base == "flag"][:2]


def test_names_get_their_punctuation_back():
    assert {
        "woman firefighter: dark skin tone",
        "red apple",
        "man: medium-light skin tone, red hair",
        "flag: brazil",
        "flag: england",
        "keycap: 1",
        "family: woman, boy",
        "kiss: man, man, light skin tone, dark skin tone",
        "kiss mark",
        "firefighter: medium skin tone",
        "woman and man holding hands: dark skin tone",
    } <= set(BY_NAME)
    assert len(BY_NAME) == len(ALL) > 3600
    assert all(name == name.lower() and "_" not in name for name in BY_NAME)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("woman firefighter: dark skin tone", ("firefighter", "woman", "dark")),
        ("firefighter: dark skin tone", ("firefighter", "person", "dark")),
        ("men wrestling", ("wrestling", "man", "")),
        ("man: medium-light skin tone, red hair", ("red hair", "man", "medium-light")),
        ("person: medium skin tone", ("adult", "person", "medium")),
        ("woman and man holding hands: dark skin tone", ("", "", "dark")),
        ("handshake: light skin tone, dark skin tone", ("", "", "several")),
        ("red apple", ("", "", "")),
    ],
)
def test_names_are_parsed(name, expected):
    item = BY_NAME[name]
    assert (item.role, item.gender, item.tone) == expected


def test_captions_state_all_parts_and_begin_with_the_name():
    for item in ALL:
        captions = item.captions()
        assert captions[0] == item.name and len(set(captions)) == 4
        assert all(part in caption and item.base in caption for caption in captions for part in item.parts)
    assert "woman firefighter with dark skin tone" in BY_NAME["woman firefighter: dark skin tone"].captions()
    assert "flag of brazil" in BY_NAME["flag: brazil"].captions()


@pytest.mark.parametrize("seed", range(4))
def test_heldout_parts_are_seen_in_every_pair_but_never_together(seed):
    splits = names.split_emoji(ALL, (), seed)
    assert sorted(item.name for items in splits.values() for item in items) == sorted(BY_NAME)
    train = [(item.role, item.gender, item.tone) for item in splits["train"]]
    heldout = [(item.role, item.gender, item.tone) for item in splits["heldout"]]
    assert len(heldout) > 200 and all(all(triple) for triple in heldout)
    assert not set(train) & set(heldout)
    for first, second in itertools.combinations(range(3), 2):
        seen = {(triple[first], triple[second]) for triple in train}
        assert {(triple[first], triple[second]) for triple in heldout} <= seen


def test_mirrored_emoji_are_held_out_together():
    heldout = {item.name for item in names.split_emoji(ALL, (), seed=0)["heldout"]}
    mirrored = [name for name in heldout if " facing right" in name]
    assert mirrored and all(name.replace(" facing right", "") in heldout for name in mirrored)


def test_validation_is_a_tenth_of_the_rest_and_follows_the_seed():
    splits, others = names.split_emoji(ALL, (), seed=0), names.split_emoji(ALL, (), seed=1)
    share = len(splits["validation"]) / (len(splits["validation"]) + len(splits["train"]))
    assert 0.08 < share < 0.12
    assert splits == names.split_emoji(ALL, (), seed=0) != others


def test_shared_drawings_stay_in_training():
    shared = [item.sequence for item in ALL[::2]]
    splits = names.split_emoji(ALL, shared, seed=0)
    assert set(shared) <= {item.sequence for item in splits["train"]}


def test_a_missing_font_names_the_package(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="fonts-noto-color-emoji"):
        Builder(data_dir=tmp_path, font=str(tmp_path / "none.ttf"))
    monkeypatch.setattr(drawing, "_FOLDERS", (str(tmp_path),))
    with pytest.raises(DataError, match="fonts-noto-color-emoji"):
        tfds.builder("emoji_captions", data_dir=tmp_path)


def test_an_unusable_font_is_rejected(tmp_path):
    (tmp_path / "font.ttf").write_bytes(b"not a font")
    with pytest.raises(DataError, match="font.ttf"):
        drawing.EmojiFont(tmp_path / "font.ttf")


class BlotFont:
    """Knows no keycaps, draws the flags of ALIKE alike, and all other emoji in different colours."""

    def __init__(self, path):
        self._index = {item.sequence: index for index, item in enumerate(ALL)}

    def draw(self, sequence):
        index = self._index[sequence]
        if ALL[index].base == "keycap":
            return None
        color = "red" if ALL[index] in ALIKE else (index % 256, index // 256, 7)
        return PIL.Image.new("RGB", (128, 128), color)


@pytest.fixture
def blot_font(tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "EmojiFont", BlotFont)
    path = tmp_path / "blots.ttf"
    path.write_bytes(b"blots")
    return str(path)


def test_builder_needs_no_tensorflow_and_counts_skipped_emoji(tmp_path, monkeypatch, blot_font):
    roles, bases = ("judge", "surfing", "red hair"), ("flag", "keycap")
    some = [item for item in ALL if item.base in bases or item.role in roles]
    monkeypatch.setattr(names, "all_emoji", lambda: some)
    builder = tfds.builder("emoji_captions", data_dir=tmp_path, font=blot_font, image_size=16)
    builder.download_and_prepare()
    assert builder.info.metadata == {"drawn": len(some) - 13, "skipped": 13}
    found = {}
    for split in ("train", "validation", "heldout"):
        for example in builder.as_data_source(split):
            item = BY_NAME[example["name"].decode()]
            found[item.name] = split
            assert example["image"].shape == (16, 16, 3) and example["image"].dtype == np.uint8
            assert tuple(text.decode() for text in example["caption"]) == item.captions()
            assert example["sequence"].decode() == item.sequence
            parts = [example[key].decode() for key in ("role", "gender", "tone")]
            assert parts == [item.role, item.gender, item.tone]
    assert "tensorflow" not in sys.modules
    assert len(found) == len(some) - 13
    assert list(found.values()).count("heldout") == 9  # three roles of three genders, one tone each
    assert [found[item.name] for item in ALIKE] == ["train", "train"]
    drawn, shared = [item for item in some if item.base != "keycap"], [item.sequence for item in ALIKE]
    expected = names.split_emoji(drawn, shared, seed=0)
    assert found == {item.name: split for split, items in expected.items() for item in items}


def test_other_options_have_other_paths_on_disk(tmp_path, blot_font):
    other = tmp_path / "other.ttf"
    other.write_bytes(b"other")
    options = ({}, {"image_size": 64}, {"seed": 1}, {"font": str(other)})
    paths = {str(Builder(data_dir=tmp_path, **{"font": blot_font, **option}).data_path) for option in options}
    assert len(paths) == 4


@pytest.fixture(scope="module")
def noto():
    try:
        return drawing.EmojiFont(drawing.find_font())
    except DataError as error:
        pytest.skip(str(error))


def test_the_font_draws_complete_sequences_only(noto):
    drawn = noto.draw(BY_NAME["woman firefighter: dark skin tone"].sequence)
    assert drawn.size == (128, 128) and drawn.mode == "RGB"
    assert noto.draw("\U0001f469\U0001f692") is None  # a woman, then a fire engine
    assert noto.draw("\U000eff80") is None  # an unassigned character
    sample = ALL[::40]
    assert sum(noto.draw(item.sequence) is not None for item in sample) > 0.9 * len(sample)


def test_drawings_fill_the_image_on_white(noto):
    image = drawing.shrink(noto.draw(BY_NAME["red apple"].sequence), 32)
    assert image.shape == (32, 32, 3) and image.dtype == np.uint8
    np.testing.assert_array_equal(image[[0, 0, -1, -1], [0, -1, 0, -1]], 255)
    assert (image != 255).any(-1).mean() > 0.5
    red, green, blue = image[16, 12].astype(int)
    assert red > green + 40 and red > blue + 40


def test_tones_differ(noto):
    drawings = [noto.draw(BY_NAME[f"waving hand: {tone} skin tone"].sequence) for tone in names.TONES]
    brightness = [np.asarray(drawn).mean() for drawn in drawings]
    assert brightness == sorted(brightness, reverse=True)
