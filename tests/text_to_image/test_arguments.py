"""Arguments of the public methods: values that mean nothing are rejected before anything is drawn."""

import dataclasses

import numpy as np
import PIL.Image
import pytest
import random_model
from random_model import SIDE, SIZE

from dalle_jax.errors import ConfigError, DataError
from dalle_jax.priors.maskgit import MaskGITPrior
from dalle_jax.text_to_image import drawing

CAPTION = "a red circle"
CELL = SIZE // SIDE
MASK = np.ones((SIZE, SIZE), bool)
IMAGE = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
NAN, INF = float("nan"), float("inf")
NO_COUNTS = (0, -1, 2.5, 2.0, True, "2", None, NAN, INF, 2**40, [2], b"2", np.float32(2), np.bool_(True))
NO_SEEDS = (-1, 2**32, 2**63, 10**5000, 0.5, 1.0, True, "0", None, NAN, [0], np.int64(-1))


class MustNotDraw(MaskGITPrior):
    """A prior that fails as soon as it draws."""

    def sample(self, *args, **kwargs):
        raise AssertionError("an argument that means nothing was used")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_model.text_to_image(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def idle(model):
    """The model with a prior that must not be used."""
    prior = MustNotDraw(model.prior.layout, model.prior.options)
    return dataclasses.replace(model, prior=prior, scorer=object())


KNOWN = np.zeros((1, SIDE**2), np.int32), np.ones((1, SIDE**2), bool)
CALLS = {
    "generate": lambda model, **changes: model.generate(**{"captions": CAPTION, **changes}),
    "best_of": lambda model, **changes: model.best_of(**{"captions": CAPTION, "candidates": 2, **changes}),
    "generate_one": lambda model, **changes: model.generate_one(
        **{"captions": [CAPTION], "n": 1, "i": 0, "j": 0, **changes}
    ),
    "chunks": lambda model, **changes: list(model.chunks(**{"captions": [CAPTION], "n": 1, **changes})),
    "complete": lambda model, **changes: model.complete(**{"image": IMAGE, "rows": 1, "caption": CAPTION, **changes}),
    "inpaint": lambda model, **changes: model.inpaint(**{"image": IMAGE, "mask": MASK, "caption": CAPTION, **changes}),
    "vary": lambda model, **changes: model.vary(**{"image": IMAGE, "strength": 0.5, "caption": CAPTION, **changes}),
    "outpaint": lambda model, **changes: model.outpaint(**{"image": IMAGE, "pad": CELL, "caption": CAPTION, **changes}),
    "draw_tokens": lambda model, **changes: model.draw_tokens(
        **{"caption": CAPTION, "n": 1, "seed": 0, "known": KNOWN, **changes}
    ),
}


@pytest.mark.parametrize("method", CALLS)
@pytest.mark.parametrize(
    "name, values, words",
    [
        ("n", NO_COUNTS, "^n is"),
        ("seed", NO_SEEDS, "^seed is"),
        ("temperature", (NAN, INF, -1.0), "^temperature"),
        ("guidance", (NAN, INF, -1.0, 1e30), "^guidance"),
        ("top_k", (0, -1), "^top_k"),
        ("top_p", (0.0, 1.5, NAN), "^top_p"),
        ("steps", (0, SIDE**2 + 1), "^steps"),
        ("choice_temperature", (-1.0, NAN), "^choice_temperature"),
        ("order", ("spiral",), "order"),
    ],
)
def test_counts_seeds_and_sampling_parameters(idle, model, method, name, values, words):
    if (method, name) == ("best_of", "n"):
        name, words = "candidates", "^candidates is"
    drawing_one = dataclasses.replace(model, scorer=object())  # only the prior itself knows its orders
    for value in values:
        with pytest.raises(ConfigError, match=words):
            CALLS[method](drawing_one if name == "order" else idle, **{name: value})


@pytest.mark.parametrize(
    "method, name, values",
    [
        ("best_of", "keep", (0, 3, 1.5, True, "1", None, NAN)),
        ("generate", "candidates", (0, -1, 2.5, "4", True, NAN)),
        ("generate_one", "i", (-1, 1, 0.0, "0", None, True)),
        ("generate_one", "j", (-1, 1, 0.0, "0", None, True)),
        ("complete", "rows", (-1, SIDE + 1, 1.5, "1", None, True, NAN)),
        ("inpaint", "dilate", (-1, 0.5, "1", None, True, NAN)),
        ("vary", "strength", (0, 1.01, -1, NAN, INF, "0.5", None, True)),
        (
            "outpaint",
            "pad",
            (0, -CELL, CELL + 1, 4.0, "4", None, True, (4, 4), (0,) * 4, (4, 0, 0, -4), 10**9, [NAN] * 4),
        ),
        ("draw_tokens", "window", (-1, 0.5, "0", None)),
    ],
)
def test_arguments_of_one_method(idle, method, name, values):
    for value in values:
        with pytest.raises(ConfigError, match=f"^{name}"):
            CALLS[method](idle, **{name: value})


def test_more_images_than_candidates(idle):
    with pytest.raises(ConfigError, match="^n is 8"):
        idle.generate(CAPTION, n=8, candidates=4)


@pytest.mark.parametrize("method", CALLS)
def test_captions(idle, method):
    name = "captions" if method in ("generate", "best_of", "generate_one", "chunks") else "caption"
    for value in (b"a red circle", None, 5, 1.5, [b"a"], [None], [["a"]], "", [], [" "]):
        if value is None and method in ("vary", "draw_tokens"):
            continue  # the empty caption
        with pytest.raises(DataError, match="(?i)caption"):
            CALLS[method](idle, **{name: value})
    with pytest.raises(DataError, match="(?i)caption"):
        CALLS[method](idle, guidance=1.0, negative=5)


@pytest.mark.parametrize("method", ["complete", "inpaint", "vary", "outpaint"])
def test_images(idle, method):
    for value, words in (
        (IMAGE.astype(float), "255"),
        (None, "None"),
        ("no.png", "no.png"),
        (IMAGE[None].repeat(2, 0), "2"),
    ):
        with pytest.raises(DataError, match=words):
            CALLS[method](idle, image=value)


@pytest.mark.parametrize(
    "known, words",
    [
        ((KNOWN[0][:, :3], KNOWN[1]), "tokens"),
        ((KNOWN[0] + 24, KNOWN[1]), "24"),
        ((KNOWN[0] + 0.5, KNOWN[1]), "float64"),
        ((KNOWN[0], KNOWN[1][:, :3]), "mask"),
        ((KNOWN[0], KNOWN[0]), "mask"),
        (None, "None"),
        (KNOWN[0], "pair"),
        ((None, KNOWN[1]), "None"),
    ],
)
def test_known_tokens(idle, known, words):
    with pytest.raises(DataError, match=words):
        CALLS["draw_tokens"](idle, known=known)


def test_unknown_tokens_may_be_anything(model):
    mask = KNOWN[1].copy()
    mask[:, 3:] = False
    draw = lambda tokens: model.draw_tokens(CAPTION, 1, 0, (tokens, mask))
    np.testing.assert_array_equal(draw(np.where(mask, 5, -1)), draw(np.where(mask, 5, 7)))


def test_tokens_to_decode(model):
    for tokens in (KNOWN[0] + 24, KNOWN[0] - 1, KNOWN[0] + 0.5, KNOWN[0][:, :3], KNOWN[0][0], "abc", None):
        with pytest.raises(DataError):
            model.decode(tokens)
    with pytest.raises(DataError):
        model.decode_grid(KNOWN[0])


def test_numpy_integers_and_the_last_seed_are_accepted(model):
    images = model.generate(CAPTION, n=np.int64(2), seed=np.uint32(2**32 - 1))
    np.testing.assert_array_equal(images, model.generate(CAPTION, n=2, seed=2**32 - 1))
    assert (images != model.generate(CAPTION, n=2, seed=0)).any()
    model.vary(IMAGE, 1, CAPTION, seed=2**32 - 1)
    assert model.outpaint(IMAGE, np.int32(CELL), CAPTION).shape == (1, SIZE + 2 * CELL, SIZE + 2 * CELL, 3)
    assert model.outpaint(IMAGE, np.array([0, 0, 0, CELL]), CAPTION).shape == (1, SIZE, SIZE + CELL, 3)


def test_edits_of_images_of_other_kinds(model, tmp_path):
    """They are the edits of the converted image. A mask of the same size follows its image."""
    large = IMAGE.repeat(3, axis=0).repeat(3, axis=1)
    wide = np.pad(large, ((0, 0), (6, 6), (0, 0)))  # the centre square is `large`
    PIL.Image.fromarray(wide).save(tmp_path / "a.png")
    mask = np.zeros(wide.shape[:2], np.uint8)
    mask[: 3 * CELL, 6 : 6 + 3 * CELL] = 255
    small = np.zeros((SIZE, SIZE), bool)
    small[:CELL, :CELL] = True
    expected = model.inpaint(IMAGE, small, CAPTION, n=2, seed=3)
    for image in (wide, tmp_path / "a.png", PIL.Image.fromarray(wide), wide / 255, wide[None], wide.transpose(2, 0, 1)):
        for given in (mask, PIL.Image.fromarray(mask), small):
            np.testing.assert_array_equal(model.inpaint(image, given, CAPTION, n=2, seed=3), expected)
        np.testing.assert_array_equal(model.encode(image), model.encode(IMAGE[None]))
    np.testing.assert_array_equal(model.complete(wide, 2, CAPTION, seed=3), model.complete(IMAGE, 2, CAPTION, seed=3))
    padding = dataclasses.replace(model, fit="pad")
    assert (padding.encode(wide) != model.encode(wide)).any()
    everything = model.inpaint(IMAGE, small, CAPTION, dilate=10**9)
    np.testing.assert_array_equal(everything, model.inpaint(IMAGE, small, CAPTION, dilate=SIDE))


def test_the_bounds_of_a_count():
    assert drawing.check_count(1, 0) == (1, 0)
    with pytest.raises(ConfigError, match=str(drawing.MOST_IMAGES)):
        drawing.check_count(drawing.MOST_IMAGES + 1, 0)
