"""The survey of a data set: its counts against a folder with everything in it, samples, and what it rejects."""

import dataclasses
import io
import itertools
import json

import numpy as np
import PIL.Image
import pytest
from memory_source import MemorySource

from dalle_jax.data import survey as surveys
from dalle_jax.data.advice import advise
from dalle_jax.data.caption_statistics import Spread, measure_captions
from dalle_jax.data.sources.record import Record
from dalle_jax.data.sources.source import DataOptions, LeftOut, Source
from dalle_jax.data.spread import in_spread_order
from dalle_jax.data.survey import THOROUGH, Effort, survey
from dalle_jax.data.text import TextModel
from dalle_jax.errors import DataError

TRANSLATIONS = "\nde.utf8=Eine Katze\npt_BR.utf8=Um gato\nru.utf8=Кошка\nja.utf8=猫"


def encoded(value, size=(40, 40), mode="RGB"):
    file = io.BytesIO()
    PIL.Image.new(mode, size, value if mode == "L" else (value, 0, 0, 255)[: len(mode)]).save(file, "PNG")
    return file.getvalue()


def write(folder, name, content, caption=None):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")


@pytest.fixture
def everything(tmp_path):
    """Training: 6 images, of which one is damaged, one has no caption and one equals another. Validation: 2 images."""
    train = tmp_path / "train"
    for i in range(3):
        write(train, f"cat{i}.png", encoded(i), "a cat" + TRANSLATIONS)
    write(train, "small.png", encoded(7, (5, 20), "RGBA"), "a small thing")
    write(train, "damaged.png", encoded(8)[:60], "never seen")
    write(train, "alone.png", encoded(9, mode="L"))
    write(tmp_path / "validation", "same.png", encoded(0), "a cat")
    write(tmp_path / "validation", "other.png", encoded(99), "one more")
    for name in ("a.svg", "b.svg", "c.SVG", "sound.ogg", "Makefile", "sub/d.heic"):
        write(train, name, b"-")
    write(train, ".thumbnails/x.png", encoded(0), "hidden")
    write(train, "__MACOSX/y.png", encoded(0), "hidden")
    return DataOptions(source="folder", path=str(tmp_path), image_size=32)


def test_a_folder_with_everything_in_it(everything):
    found = survey(everything)
    train, validation = found.splits["train"], found.splits["validation"]
    assert (train.examples, train.looked_at, train.with_captions, train.captions) == (6, 6, 5, 3 * 5 + 2)
    assert (validation.examples, validation.captions, validation.left_out) == (2, 2, {})
    assert {"unreadable image": 1, "empty caption": 1}.items() <= train.left_out.items()
    assert {".svg": 3, ".ogg": 1}.items() <= found.other_files.items()
    assert (found.images.smallest, found.images.largest) == ((5, 20), (40, 40))
    assert (found.images.below_image_size, found.images.cropped) == (1, 1)
    assert found.images.formats == {"PNG": 7} and found.images.modes == {"RGB": 5, "RGBA": 1, "L": 1}
    assert (found.images.duplicates, found.images.in_both_splits) == (1, 1)
    assert found.captions.per_image == Spread(1, 5) and found.captions.without == 1 / 8
    assert found.captions.translations == 12 / 19 and found.captions.other_scripts == 6 / 19


def test_the_survey_is_json(everything):
    written = json.loads(json.dumps(survey(everything).to_dict()))
    assert written["splits"]["train"]["examples"] == 6
    assert written["splits"]["train"]["left_out"]["empty caption"] == 1
    assert written["other_files"][".svg"] == 3


def test_the_remarks_name_the_key_that_helps(everything):
    remarks = "\n".join(advise(survey(everything, text_length=1), everything))
    for key in ("data.caption_lines=first", "text.length", "caption_from=", ".svg", "same bytes"):
        assert key in remarks
    assert "image_size" in remarks


def test_images_that_lose_much_to_the_square(tmp_path):
    for i in range(30):
        write(tmp_path, f"{i}.png", encoded(i, (80, 40)), f"number {i}")
    options = DataOptions(source="folder", path=str(tmp_path))
    found = survey(options)
    assert found.images.cropped == 30 and any("data.fit=pad" in remark for remark in advise(found, options))
    padded = dataclasses.replace(options, fit="pad")
    assert survey(padded).images.cropped == 0 and not any("fit" in remark for remark in advise(survey(padded), padded))


def test_images_of_a_single_colour_as_the_model_sees_them(tmp_path):
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 50:] = 255  # outside of the centre square
    for i in range(30):
        PIL.Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    pixels[9, 30] = 1
    PIL.Image.fromarray(pixels).save(tmp_path / "spot.png")
    options = DataOptions(source="folder", path=str(tmp_path))
    found = survey(options)
    assert found.images.blank == 30 and len(found.images.blank_names) == 3
    (remark,) = (remark for remark in advise(found, options) if "single colour" in remark)
    assert all(name in remark for name in found.images.blank_names) and "…" in remark
    assert "data.fit=pad" in remark


@pytest.mark.parametrize("records", [20, 2000])
def test_copies_on_both_sides_of_a_sample(tmp_path, records):
    """A sample of the training images finds some of the copies."""
    for i in range(40):
        write(tmp_path, f"train/{i}.png", encoded(i), "a cat")
        write(tmp_path, f"validation/{i}.png", encoded(i), "a cat")
    options = DataOptions(source="folder", path=str(tmp_path))
    found = survey(options, effort=dataclasses.replace(THOROUGH, records=records))
    (remark,) = (remark for remark in advise(found, options) if "same bytes" in remark)
    assert found.images.in_both_splits == min(records, 40)
    assert remark.startswith("At least 20" if records == 20 else "40")


def test_a_plain_set_needs_no_remark(tmp_path):
    for i in range(30):
        PIL.Image.fromarray(np.arange(3072, dtype=np.uint8).reshape(32, 32, 3) + np.uint8(i)).save(
            tmp_path / f"{i}.png"
        )
        (tmp_path / f"{i}.txt").write_text(f"number {i}")
    options = DataOptions(source="folder", path=str(tmp_path))
    found = survey(options, text_length=20)
    assert advise(found, options) == () and found.captions.tokens.share_cut == 0.0
    assert sum(split.examples for split in found.splits.values()) == 30


def test_images_without_captions(tmp_path):
    for i in range(30):
        write(tmp_path, f"{i}.png", encoded(i))
    options = DataOptions(source="folder", path=str(tmp_path))
    found = survey(options)
    assert found.captions is None and found.splits["train"].left_out == {
        "empty caption": found.splits["train"].examples
    }
    assert survey(options, captions="ignored").splits["train"].left_out == {}
    assert "caption_from=file_names" in advise(found, options)[0]
    with pytest.raises(DataError, match="caption_from"):
        survey(options, captions="required")


def test_no_usable_image(tmp_path):
    for i in range(30):
        write(tmp_path, f"{i}.png", b"no image", "a caption")
    with pytest.raises(DataError, match="data.path"):
        survey(DataOptions(source="folder", path=str(tmp_path)))


class Listed(Source):
    """Records from a list; `left_out` as a prepared data set has it."""

    description = "listed"
    left_out = (LeftOut("missing image", 4, ("x",)),)

    def __init__(self, records):
        self.records, self.read = records, []

    def __len__(self):
        return len(self.records)

    def record(self, index):
        self.read.append(index)
        return self.records[index]


def listed(count, caption="a cat", image=None):
    image = encoded(1) if image is None else image
    return Listed([Record(image, (f"{caption} {i}",), f"#{i}", {}) for i in range(count)])


def test_examples_that_the_source_lacks_are_counted():
    found = survey(DataOptions(), {"train": listed(3), "validation": listed(1)})
    assert found.splits["train"].left_out == {"missing image": 4} and found.splits["train"].examples == 3


def test_unreadable_records_are_counted_by_reason():
    sources = {"train": MemorySource(20, broken=(3, 4)), "validation": MemorySource(5)}
    found = survey(DataOptions(image_size=16), sources)
    assert found.splits["train"].left_out == {"missing file": 2} and found.splits["train"].captions == 36
    assert found.images.formats == {"array": 23} and found.images.below_image_size == 23


def test_a_large_split_is_sampled_evenly():
    sources = {"train": listed(1000), "validation": listed(10)}
    found = survey(DataOptions(), sources, effort=Effort(records=200))
    train = found.splits["train"]
    assert (train.examples, train.looked_at, train.captions) == (1000, 200, 1000)
    assert found.splits["validation"].looked_at == 10
    assert sorted(sources["train"].read) == sorted(itertools.islice(in_spread_order(1000), 200))


def test_few_bytes_and_pixels_are_read():
    sources = {"train": listed(300), "validation": listed(1)}
    train = survey(DataOptions(), sources, effort=Effort(file_bytes=1)).splits["train"]
    assert 100 <= train.looked_at == train.decoded < 150
    train = survey(DataOptions(), sources, effort=Effort(pixels=40 * 40 * 150)).splits["train"]
    assert (train.looked_at, train.decoded) == (300, 150)


@pytest.mark.parametrize("count", [0, 1, 2, 10, 97, 1000])
def test_the_order_visits_everything_once_and_evenly(count):
    order = list(in_spread_order(count))
    assert sorted(order) == list(range(count))
    for many in (10, 50):
        if count >= 97:
            gaps = np.diff([*sorted(order[:many]), count])
            assert gaps.max() < 3.5 * count / many


def test_too_many_pixels_are_a_reason():
    sources = {"train": listed(3), "validation": listed(1, image=encoded(0, (3, 3)))}
    with pytest.raises(DataError, match="too many pixels"):
        survey(DataOptions(max_pixels=1000), sources)


def test_tokens_against_a_count():
    captions = [["a red cat"], ["a red cat and a very blue dog"], ["cat"]] * 3
    model = TextModel.train([each[0] for each in captions], 40)
    counts = sorted(len(model.encode(each[0], max_length=99)[0]) for each in captions)
    tokens = measure_captions(captions, text_length=counts[4], text_model=model).tokens
    assert tokens.per_caption == Spread(counts[4], counts[-1]) and tokens.length_for_all == counts[-1]
    assert tokens.share_cut == sum(each > counts[4] for each in counts) / 9 and not tokens.trained
    own = measure_captions(captions, vocab_size=40).tokens
    assert own.trained and own.vocab_size == model.vocab_size and own.share_cut is None


def test_the_length_for_99_percent():
    captions = [["cat"]] * 197 + [["cat cat cat"], ["cat " * 30], ["cat " * 40]]
    model = TextModel.train(["cat"], 10)
    tokens = measure_captions(captions, text_model=model).tokens
    one, three, forty = (len(model.encode("cat " * n, max_length=500)[0]) for n in (1, 3, 40))
    assert (tokens.per_caption.median, tokens.length_for_99_percent, tokens.length_for_all) == (one, three, forty)


@pytest.mark.parametrize(
    "captions, translations, other_scripts",
    [
        (["A cat", "de.utf8=Eine Katze", "zh_CN.utf8=猫", "ca@valencia.utf8=Un gat"], 3 / 4, 1 / 4),
        (["Кот", "Cat"], 0.0, 1 / 2),
        (["x=1 and y=2", "a = b", "the cat=dog", "42"], 0.0, 0.0),
        (["café", "naïve"], 0.0, 0.0),
    ],
)
def test_languages(captions, translations, other_scripts):
    found = measure_captions([captions])
    assert (found.translations, found.other_scripts) == (translations, other_scripts)


def test_both_splits_are_named(everything):
    assert set(surveys.open_splits(everything)) == set(survey(everything).splits) == {"train", "validation"}
