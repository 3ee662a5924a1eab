"""Drawn images in the forms that callers want: PIL images, one by one, with a progress bar, under other names."""

import dataclasses
import inspect
import itertools

import numpy as np
import pytest
import random_model
from PIL import Image
from random_model import SIDE, SIZE

from dalle_jax import TextToImage
from dalle_jax.errors import ConfigError, DataError
from dalle_jax.priors.maskgit import MaskGITPrior
from dalle_jax.text_to_image import drawing, output
from dalle_jax.text_to_image.best_of_n import Ranked
from dalle_jax.text_to_image.other_names import _OURS, in_our_names

CAPTION, OTHER = "a red circle", "a green star"
CELL = SIZE // SIDE
IMAGE = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
MASK = np.zeros((SIZE, SIZE), bool)
MASK[:CELL, :CELL] = True


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_model.text_to_image(tmp_path_factory.mktemp("text"))


# -- forms --------------------------------------------------------------------------------------------------------


def test_pil_images_have_the_pixels_of_the_arrays(model):
    arrays, images = model.generate(CAPTION, n=3), model.generate(CAPTION, n=3, output="pil")
    assert [type(image) for image in images] == [Image.Image] * 3
    np.testing.assert_array_equal([np.asarray(image) for image in images], arrays)
    both = model.generate([CAPTION, OTHER], n=2, output="pil")
    assert [len(row) for row in both] == [2, 2] and both[0][0].size == (SIZE, SIZE)
    wide = model.outpaint(images[0], (0, 0, 0, CELL), CAPTION, output="pil")
    assert [image.size for image in wide] == [(SIZE + CELL, SIZE)]


EDITS = {
    "complete": lambda model, captions, **how: model.complete(IMAGE, 1, captions, **how),
    "inpaint": lambda model, captions, **how: model.inpaint(IMAGE, MASK, captions, **how),
    "vary": lambda model, captions, **how: model.vary(IMAGE, 0.5, captions, **how),
    "outpaint": lambda model, captions, **how: model.outpaint(IMAGE, (0, CELL, 0, CELL), captions, **how),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edits_for_several_captions(model, edit):
    """They are the edits for each caption, and have one more axis."""
    call = EDITS[edit]
    both = call(model, [CAPTION, OTHER], n=3, seed=5)
    assert both.shape[:2] == (2, 3)
    for images, caption in zip(both, (CAPTION, OTHER), strict=True):
        np.testing.assert_array_equal(images, call(model, caption, n=3, seed=5))
    assert (both[0] != both[1]).any()
    np.testing.assert_array_equal(call(model, iter([OTHER]), seed=5)[0], both[1, :1])
    as_pil = call(model, [CAPTION, OTHER], n=1, seed=5, output="pil")
    np.testing.assert_array_equal(np.asarray(as_pil[1][0]), both[1, 0])
    with pytest.raises(DataError, match="(?i)caption"):
        call(model, [])


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_variation_without_a_caption(model, monkeypatch, share):
    """It is drawn under the empty caption. A prior that never saw one says so."""
    seen = []
    monkeypatch.setattr(drawing.logging, "warning", lambda text, *_: seen.append(text))
    options = dataclasses.replace(model.prior.options, caption_drop=share)
    trained = dataclasses.replace(model, prior=MaskGITPrior(model.prior.layout, options))
    images = trained.vary(IMAGE, 0.5, n=2)
    assert images.shape == (2, SIZE, SIZE, 3) and (images != trained.vary(IMAGE, 0.5, CAPTION, n=2)).any()
    assert sum("caption_drop" in text for text in seen) == (share == 0)


# -- one by one, and the bar --------------------------------------------------------------------------------------


def test_a_stream_gives_the_images_of_generate_as_they_are_drawn(model, monkeypatch):
    whole = model.generate([CAPTION, OTHER], n=3, seed=2)
    drawn, draw = [], drawing.draw
    monkeypatch.setattr(drawing, "draw", lambda *arguments: drawn.append(1) or draw(*arguments))
    stream = model.generate([CAPTION, OTHER], n=3, seed=2, stream=True)
    assert not drawn, "nothing is drawn before the first image is asked for"
    first = next(stream)
    assert len(drawn) == 1
    images = [first, *stream]
    np.testing.assert_array_equal(images, whole.reshape(6, SIZE, SIZE, 3))
    (image,) = itertools.islice(model.generate(CAPTION, n=512, stream=True, output="pil"), 1)
    assert isinstance(image, Image.Image)


def test_arguments_of_a_stream_are_checked_at_once(model):
    for wrong in ({"top_k": 0}, {"n": 0}, {"order": "spiral"}, {"seed": -1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            model.generate(CAPTION, stream=True, **wrong)
    with pytest.raises(DataError, match="(?i)caption"):
        model.generate("", stream=True)


@pytest.mark.parametrize(
    "wrong, word",
    [
        ({"output": "jpg"}, "^output"),
        ({"output": None}, "^output"),
        ({"output": ["pil"]}, "^output"),
        ({"stream": 1}, "^stream"),
        ({"stream": True, "candidates": 2}, "candidates"),
        ({"progress": "yes"}, "^progress"),
    ],
    ids=str,
)
def test_wrong_forms(model, wrong, word):
    with pytest.raises(ConfigError, match=word):
        model.generate(CAPTION, **wrong)


def test_the_bar_counts_images(model, capsys):
    model.generate([CAPTION, OTHER], n=3, progress=True)
    assert "6/6" in capsys.readouterr().err
    list(model.generate(CAPTION, n=4, progress=True, stream=True))
    assert "4/4" in capsys.readouterr().err


def test_the_bar_is_for_people_who_wait(model, capsys, monkeypatch):
    model.generate(CAPTION, n=3)
    assert "/3" not in capsys.readouterr().err, "no person watches a file"
    monkeypatch.setattr(output, "_is_watched", lambda: True)
    model.generate(CAPTION, n=3)
    assert "3/3" in capsys.readouterr().err, "two chunks"
    model.generate(CAPTION, n=2)
    model.generate(CAPTION, n=3, progress=False)
    assert "2/2" not in (shown := capsys.readouterr().err) and "3/3" not in shown


# -- names of diffusers -------------------------------------------------------------------------------------------


def test_the_names_of_diffusers_are_understood(model):
    theirs = model.generate(
        prompt=CAPTION,
        num_images_per_prompt=2,
        num_inference_steps=2,
        guidance_scale=3.0,
        negative_prompt=OTHER,
        output_type="np",
    )
    ours = model.generate(CAPTION, n=2, steps=2, guidance=2.0, negative=OTHER)
    np.testing.assert_array_equal(theirs, ours)
    assert (ours != model.generate(CAPTION, n=2, steps=2)).any()
    unguided = model.generate(CAPTION, guidance_scale=1.0)
    np.testing.assert_array_equal(unguided, model.generate(CAPTION))
    edited = model.inpaint(prompt=CAPTION, image=IMAGE, mask_image=MASK, num_images_per_prompt=2)
    np.testing.assert_array_equal(edited, model.inpaint(IMAGE, MASK, CAPTION, n=2))


def test_every_other_name_is_that_of_a_parameter():
    generate = inspect.signature(TextToImage.generate).parameters
    inpaint = inspect.signature(TextToImage.inpaint).parameters
    assert all(ours in generate or ours in inpaint for names in _OURS.values() for ours in names)


def test_an_argument_under_both_names():
    with pytest.raises(ConfigError, match="num_images_per_prompt"):
        in_our_names({"num_images_per_prompt": 2, "n": 3}, ["n"])
    assert in_our_names({"prompt": 1}, ["prompt", "caption"]) == {"prompt": 1}, "a parameter keeps its own name"


@pytest.mark.parametrize(
    "given, word",
    [
        ({"generator": 5}, "seed"),
        ({"height": 512}, "image_size"),
        ({"temprature": 1.0}, "temperature"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"guidance_scale": "7"}, "guidance_scale"),
        ({"output_type": "latent"}, "output_type"),
    ],
    ids=str,
)
def test_other_arguments_are_answered(model, given, word):
    with pytest.raises(ConfigError, match=word):
        model.generate(CAPTION, **given)


# -- one line -----------------------------------------------------------------------------------------------------


def test_every_object_of_the_interface_is_shown_in_one_line(model):
    ranked = Ranked(np.zeros((2, 3, 4, 4, 3), np.uint8), np.array([[0.5, 0.25, 0.1]] * 2), np.zeros((2, 3), int))
    for shown in (repr(model), repr(ranked), repr(Ranked(ranked.images, None, ranked.numbers))):
        assert "\n" not in shown and len(shown) < 300, shown
    assert "2 x 3" in repr(ranked) and "0.500" in repr(ranked)
