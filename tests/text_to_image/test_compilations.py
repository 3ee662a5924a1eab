"""Few programs: calls with other numbers of images or captions compile nothing, and draw the same images."""

import contextlib
import dataclasses
import logging
import re

import flax.linen as nn
import jax
import numpy as np
import pytest
import random_model
from random_model import SIZE, TRUNK

from dalle_jax.priors.autoregressive import AutoregressiveOptions, AutoregressivePrior
from dalle_jax.reporting.images import to_uint8
from dalle_jax.text_to_image import drawing

CAPTION = "a red circle"
CAPTIONS = [CAPTION, "a green star", "a blue square", "a red star"]


@pytest.fixture(scope="module")
def maskgit(tmp_path_factory):
    return dataclasses.replace(random_model.text_to_image(tmp_path_factory.mktemp("text")), rows_at_once=64)


@pytest.fixture(scope="module")
def autoregressive(maskgit):
    prior = AutoregressivePrior(maskgit.prior.layout, AutoregressiveOptions(TRUNK, kernel=3))
    return dataclasses.replace(maskgit, prior=prior, params=nn.meta.unbox(jax.jit(prior.init)(jax.random.key(1))))


@pytest.fixture(params=["maskgit", "autoregressive"])
def model(request):
    return request.getfixturevalue(request.param)


@contextlib.contextmanager
def compiled(caplog):
    """Collects the names of the programs that are compiled inside the block."""
    names = []
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        caplog.clear()
        yield names
        names += [found[1] for record in caplog.records if (found := re.match(r"Compiling (\S+)", record.getMessage()))]
    caplog.clear()


def test_programs_are_seen(caplog):
    with compiled(caplog) as names:
        jax.jit(lambda x: x + 1)(np.zeros(3))
    assert len(names) == 1


def test_one_to_eight_images_share_one_program(model, caplog):
    eight = model.generate(CAPTION, n=8, seed=1)
    with compiled(caplog) as names:
        for n in range(1, 9):
            np.testing.assert_array_equal(model.generate(CAPTION, n=n, seed=1), eight[:n])
        for count in range(1, 5):
            images = model.generate(CAPTIONS[:count], n=2, seed=1)
            np.testing.assert_array_equal(images[0], eight[:2])
        np.testing.assert_array_equal(model.generate_one(CAPTIONS, 2, 0, 1, seed=1), eight[1])
    assert names == []
    assert len({image.tobytes() for image in eight}) == 8


def test_more_images_need_one_program_for_each_doubling(maskgit, caplog):
    shapes = {part.shape for n in range(1, 65) for part in drawing.chunks(maskgit, 1, n)}
    assert shapes == {(8, 1), (1, 16), (1, 32), (1, 64)}
    shapes = {
        part.shape for captions in range(1, 65) for n in range(1, 65) for part in drawing.chunks(maskgit, captions, n)
    }
    assert len(shapes) <= 12 and all(texts * each <= 64 for texts, each in shapes)
    sixteen = maskgit.generate(CAPTION, n=16, seed=1)
    with compiled(caplog) as names:
        np.testing.assert_array_equal(maskgit.generate(CAPTION, n=9, seed=1), sixteen[:9])
    assert names == []
    np.testing.assert_array_equal(maskgit.generate(CAPTION, n=3, seed=1), sixteen[:3])


@pytest.mark.parametrize(
    "n, captions, rows", [(1, 1, 64), (3, 5, 8), (5, 3, 2), (70, 1, 64), (16, 5, 64), (12, 3, 100)]
)
def test_chunks_hold_every_image_once_in_order(maskgit, n, captions, rows):
    found = []
    for part in drawing.chunks(dataclasses.replace(maskgit, rows_at_once=rows), captions, n):
        texts, numbers = part.rows()
        assert len(texts) == part.shape[0] and len(numbers) == np.prod(part.shape) <= rows
        each = np.stack([np.repeat(texts, len(numbers) // len(texts)), numbers], axis=-1)
        images = part.images(each)
        assert images.shape == (part.captions, part.candidates, 2)
        assert all(part.holds(*place) for place in images.reshape(-1, 2))
        found += images.reshape(-1, 2).tolist()
    assert sorted(found) == [[i, j] for i in range(captions) for j in range(n)]
    assert [i for i, _ in found] == sorted(i for i, _ in found), "all images of a caption come before the next one"


def test_a_large_model_draws_few_surplus_rows(maskgit, monkeypatch):
    monkeypatch.setattr(drawing, "_CHEAP", 0)
    shapes = lambda captions, n: [part.shape for part in drawing.chunks(maskgit, captions, n)]
    assert shapes(1, 1) == [(1, 1)] and shapes(1, 2) == [(1, 2)] and shapes(1, 5) == [(1, 8)]
    assert shapes(3, 1) == [(4, 1)] and shapes(2, 3) == [(2, 4)]


def edits(model, original):
    """Returns the edits that work with a model: functions of n."""
    mask = np.zeros((SIZE, SIZE), bool)
    mask[:, SIZE // 2 :] = True
    calls = [lambda n: model.complete(original, 2, CAPTION, n=n, seed=2)]
    if model.prior.any_order:
        calls += [
            lambda n: model.inpaint(original, mask, CAPTION, n=n, seed=2),
            lambda n: model.vary(original, 0.5, CAPTION, n=n, seed=2),
            lambda n: model.outpaint(original, (0, 0, 0, 8), CAPTION, n=n, seed=2),
        ]
    return calls


def test_edits_share_one_program(model, caplog):
    original = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    for call in edits(model, original):
        eight = call(8)
        with compiled(caplog) as names:
            for n in (1, 3, 7):
                np.testing.assert_array_equal(call(n), eight[:n])
        assert names == []


def test_encode_and_decode_share_one_program(maskgit, caplog):
    images = np.random.default_rng(0).integers(0, 256, (8, SIZE, SIZE, 3), np.uint8)
    tokens = maskgit.encode(images)
    decoded = maskgit.decode(tokens)
    with compiled(caplog) as names:
        for count in range(1, 8):
            np.testing.assert_array_equal(maskgit.encode(images[:count]), tokens[:count])
            np.testing.assert_array_equal(maskgit.decode(tokens[:count]), decoded[:count])
    assert names == []
    fewer = dataclasses.replace(maskgit, rows_at_once=3)
    np.testing.assert_array_equal(fewer.encode(images), tokens)


def test_the_compilation_is_announced_once(model, caplog):
    drawing._announce.cache_clear()
    said = lambda: [record for record in caplog.records if "Compiling once for up to 8" in record.getMessage()]
    with caplog.at_level(logging.WARNING):
        model.generate(CAPTION, n=3)
        assert len(said()) == 1
        model.generate(CAPTIONS, n=2, temperature=0.5, seed=3)
        assert len(said()) == 1
        model.generate(CAPTION, top_k=3)
        assert len(said()) == 2


def test_guidance_of_a_prior_that_never_saw_the_empty_caption(model, caplog):
    options = dataclasses.replace(model.prior.options, caption_drop=0.0)
    never = dataclasses.replace(model, prior=dataclasses.replace(model.prior, options=options))
    said = lambda: [record for record in caplog.records if "caption_drop=0" in record.getMessage()]
    with caplog.at_level(logging.WARNING):
        model.generate(CAPTION, guidance=1.0), never.generate(CAPTION)
        assert not said()
        never.generate(CAPTION, guidance=1.0), never.generate(CAPTION, guidance=2.0)
        assert len(said()) == 1


def test_repeated_calls_keep_no_arrays(model):
    model.generate(CAPTION)
    before = len(jax.live_arrays())
    for seed in range(20):
        model.generate(CAPTION, n=1 + seed % 8, seed=seed)
    assert len(jax.live_arrays()) <= before


def test_tokens_stay_on_the_devices(model, monkeypatch):
    """A chunk is read once, as pixels, and these are the pixels of the decoded tokens."""
    images = model.generate(CAPTION, n=3, seed=1)
    reads = []

    def recorded(convert):
        def call(x, *args, **kwargs):
            reads.extend([(x.dtype, x.ndim)] if isinstance(x, jax.Array) else [])
            return convert(x, *args, **kwargs)

        return call

    for name in ("array", "asarray"):  # the only ways from a device to the host in this package's drawing
        monkeypatch.setattr(np, name, recorded(getattr(np, name)))
    again = model.generate(CAPTION, n=3, seed=1)
    monkeypatch.undo()
    assert reads == [(np.uint8, 4)]
    np.testing.assert_array_equal(again, images)
    nothing = np.zeros((3, model.prior.layout.image_length), np.int32)
    tokens = model.draw_tokens(CAPTION, 3, 1, (nothing, nothing > 0))
    np.testing.assert_array_equal(model.decode(tokens), images)
    decoded = model.tokenizer.decode(model.tokenizer_params, tokens.reshape(3, random_model.SIDE, random_model.SIDE))
    np.testing.assert_array_equal(to_uint8(decoded), images)
