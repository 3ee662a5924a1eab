"""Images while they are drawn: `on_frame` changes no image, and sees each of them grow."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest
import random_model
from random_model import SIDE, SIZE, TRUNK

from dalle_jax.distributed.mesh import make_mesh
from dalle_jax.priors.autoregressive import AutoregressiveOptions, AutoregressivePrior
from dalle_jax.text_to_image.drawing import GREY

CAPTION = "a red circle"


@pytest.fixture(scope="module")
def maskgit(tmp_path_factory):
    return dataclasses.replace(random_model.text_to_image(tmp_path_factory.mktemp("text")), rows_at_once=8)


@pytest.fixture(scope="module")
def autoregressive(maskgit):
    prior = AutoregressivePrior(maskgit.prior.layout, AutoregressiveOptions(TRUNK, kernel=3))
    return dataclasses.replace(maskgit, prior=prior, params=nn.meta.unbox(jax.jit(prior.init)(jax.random.key(1))))


@pytest.fixture(params=["maskgit", "autoregressive"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def original():
    return np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)


def watched(model):
    """Returns the model with a watcher, and the list of its frames: (candidate, progress, images)."""
    seen = []
    on_frame = lambda frame: seen.append((frame.candidate, frame.progress, frame.images()))
    return dataclasses.replace(model, on_frame=on_frame), seen


def grey(images):
    """The share of grey pixels."""
    return (images == GREY).all(-1).mean()


def test_the_images_are_those_of_generate(model):
    watching, seen = watched(model)
    images = watching.generate(CAPTION, n=3, seed=1)
    np.testing.assert_array_equal(images, model.generate(CAPTION, n=3, seed=1))
    assert len(seen) == (3 if model.prior.name == "maskgit" else SIDE)
    assert {frame.shape for *_, frame in seen} == {(1, *images.shape)}
    np.testing.assert_array_equal(seen[-1][2][0], images)
    shares = [grey(frame) for *_, frame in seen]
    assert shares == sorted(shares, reverse=True) and shares[0] > 0.5 and shares[-1] < 0.01


def test_row_by_row(autoregressive):
    watching, seen = watched(autoregressive)
    watching.generate(CAPTION, seed=1)
    for row, (_, progress, images) in enumerate(seen, 1):
        assert progress == row / SIDE
        assert (images[0, 0, row * SIZE // SIDE :] == GREY).all()
        assert (images[0, 0, : row * SIZE // SIDE] != GREY).any()


def test_each_chunk_is_seen(maskgit):
    watching, seen = watched(dataclasses.replace(maskgit, rows_at_once=4))
    images = watching.generate(CAPTION, n=6, seed=1)
    assert [candidate for candidate, *_ in seen] == [0, 0, 0, 4, 4, 4]
    np.testing.assert_array_equal(images, np.concatenate([seen[2][2][0], seen[5][2][0]]))


def edits(model, image):
    """Calls of all edits that a model has."""
    mask = np.zeros((SIZE, SIZE), bool)
    mask[:4, :4] = True
    calls = {"complete": lambda m: m.complete(image, 2, CAPTION, n=3, seed=2)}
    if model.prior.any_order:
        calls |= {
            "inpaint": lambda m: m.inpaint(image, mask, CAPTION, n=3, seed=2),
            "vary": lambda m: m.vary(image, 0.5, CAPTION, n=3, seed=2),
            "outpaint": lambda m: m.outpaint(image, (0, 4, 0, 8), CAPTION, n=3, seed=2),
        }
    return calls


def test_edits_are_the_same_and_are_seen(model, original):
    for name, call in edits(model, original).items():
        watching, seen = watched(model)
        images = call(watching)
        np.testing.assert_array_equal(images, call(model), err_msg=name)
        assert seen and all(frame.shape == (1, *images.shape) for *_, frame in seen), name
        shares = [grey(frame) for *_, frame in seen]
        assert shares == sorted(shares, reverse=True), name


def test_frames_of_an_edit_show_the_given_pixels(maskgit, original):
    mask = np.zeros((SIZE, SIZE), bool)
    mask[:4, :4] = True
    watching, seen = watched(maskgit)
    images = watching.inpaint(original, mask, CAPTION, n=3, seed=2)
    kept = (images == original).all((0, 3))
    assert 0.3 < kept.mean() < 0.9
    for *_, frame in seen:
        np.testing.assert_array_equal(frame[0][:, kept], np.tile(original[kept], (3, 1, 1)))


def test_an_exception_stops_the_drawing(model):
    class Enough(Exception):
        pass

    count = []

    def on_frame(frame):
        count.append(frame.progress)
        raise Enough

    with pytest.raises(Enough):
        dataclasses.replace(model, on_frame=on_frame).generate(CAPTION, n=20)
    assert len(count) == 1


def test_candidates_are_seen(maskgit):
    class Scorer:
        def score(self, images, captions):
            return images.reshape(len(images), -1).mean(1)

    watching, seen = watched(dataclasses.replace(maskgit, scorer=Scorer()))
    best = watching.best_of(CAPTION, candidates=12, keep=2, seed=1)
    alone = dataclasses.replace(maskgit, scorer=Scorer()).best_of(CAPTION, candidates=12, keep=2, seed=1)
    np.testing.assert_array_equal(best.images, alone.images)
    assert {candidate for candidate, *_ in seen} == {0, 8}


def test_on_several_devices(maskgit):
    split = dataclasses.replace(maskgit, mesh=make_mesh(data=8))
    watching, seen = watched(split)
    np.testing.assert_array_equal(watching.generate(CAPTION, n=8, seed=1), split.generate(CAPTION, n=8, seed=1))
    assert len(seen) == 3


def test_frames_that_nobody_reads_decode_nothing(maskgit, monkeypatch):
    from dalle_jax.text_to_image import drawing

    def fail(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr(drawing, "decode_partly", fail)
    assert len(dataclasses.replace(maskgit, on_frame=lambda frame: None).generate(CAPTION, n=2)) == 2
