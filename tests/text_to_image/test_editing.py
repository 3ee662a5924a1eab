"""Edits: drawn cells, kept pixels, and errors. The weights are random, because nothing here depends on learning."""

import dataclasses

import jax
import numpy as np
import pytest
import random_model
from flax import linen as nn
from random_model import SIDE, SIZE, TRUNK

from dalle_jax.errors import ConfigError, DataError
from dalle_jax.priors.autoregressive import AutoregressiveOptions, AutoregressivePrior
from dalle_jax.priors.maskgit import MaskGITPrior
from dalle_jax.text_to_image import drawing, editing

CAPTION = "a red circle"
CELL = SIZE // SIDE


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_model.text_to_image(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def original():
    blocks = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    return blocks.repeat(CELL, axis=0).repeat(CELL, axis=1)


def drawn_tokens(model, call):
    """Returns the result of `call(model)`, and (known, mask, tokens) of each call of the sampler."""
    seen = []

    @dataclasses.dataclass(frozen=True)
    class Spy(MaskGITPrior):
        def sample(self, *args, known=None, **sampling):
            tokens = super().sample(*args, known=known, **sampling)
            seen.append((*map(np.asarray, known), np.asarray(tokens)))
            return tokens

    spy = dataclasses.replace(model, prior=Spy(model.prior.layout, model.prior.options))
    return call(spy), seen


def test_inpainting_changes_the_dilated_cells_and_nothing_else(model, original):
    mask = np.zeros((SIZE, SIZE), bool)
    mask[1, 2] = True  # one pixel of cell (0, 0): with its neighbours, cells (0..1, 0..1)
    (out, seen) = drawn_tokens(model, lambda m: m.inpaint(original, mask, CAPTION, n=3, seed=1))
    assert out.shape == (3, SIZE, SIZE, 3) and out.dtype == np.uint8
    outside = np.ones((SIZE, SIZE), bool)
    outside[: 2 * CELL, : 2 * CELL] = False
    np.testing.assert_array_equal(out[:, outside], np.broadcast_to(original[outside], (3, outside.sum(), 3)))
    assert all((o[~outside] != original[~outside]).any() for o in out)
    cells = np.ones((SIDE, SIDE), bool)
    cells[:2, :2] = False
    given = model.encode(original[None])[0]
    for known, kept, tokens in seen:
        np.testing.assert_array_equal(kept, np.tile(cells.reshape(1, -1), (len(kept), 1)))
        np.testing.assert_array_equal(tokens[kept], np.tile(given, (len(kept), 1))[kept])
        np.testing.assert_array_equal(known, np.tile(given, (len(kept), 1)))
    exact = model.inpaint(original, mask, CAPTION, seed=1, dilate=0)[0]
    assert (exact[CELL:] == original[CELL:]).all() and (exact[:, CELL:] == original[:, CELL:]).all()


def test_a_second_model_of_equal_sizes_compiles_nothing(model, original, tmp_path):
    """Tokenizers with equal options share their compiled programs."""
    tokens = model.encode(original[None])
    model.decode(tokens)
    programs = lambda: (drawing.encode._cache_size(), drawing.decode._cache_size())
    before = programs()
    other = random_model.text_to_image(tmp_path)
    assert other.tokenizer is not model.tokenizer
    other.decode(other.encode(original[None]))
    assert programs() == before


def test_an_edit_depends_only_on_its_seed(model, original):
    mask = np.eye(SIZE, dtype=bool)
    three = model.inpaint(original, mask, CAPTION, n=3, seed=4)
    np.testing.assert_array_equal(model.inpaint(original, mask, CAPTION, n=1, seed=4)[0], three[0])
    assert (three[0] != three[1]).any() and (model.inpaint(original, mask, CAPTION, seed=5)[0] != three[0]).any()


def test_inpainting_everything_equals_generate(model, original):
    everything = np.ones((SIZE, SIZE), np.uint8)
    np.testing.assert_array_equal(model.inpaint(original, everything, CAPTION, n=2), model.generate(CAPTION, n=2))


def test_complete(model, original):
    for rows in (0, 1, 4):
        out = model.complete(original, rows, CAPTION, n=2)
        np.testing.assert_array_equal(out[:, : rows * CELL], np.stack([original[: rows * CELL]] * 2))
    np.testing.assert_array_equal(model.complete(original, 0, CAPTION, n=2), model.generate(CAPTION, n=2))


def test_vary(model, original):
    (out, seen) = drawn_tokens(model, lambda m: m.vary(original, 0.25, CAPTION, n=2))
    assert out.shape == (2, SIZE, SIZE, 3)
    masks = seen[0][1].reshape(2, SIDE, SIDE)
    assert ((~masks).sum((1, 2)) == 4).all() and (masks[0] != masks[1]).any()
    for image, kept in zip(out, masks):
        far = ~editing.dilated(~kept, 1).repeat(CELL, 0).repeat(CELL, 1)
        np.testing.assert_array_equal(image[far], original[far])
    (_, seen) = drawn_tokens(model, lambda m: m.vary(original, 1.0, CAPTION))
    assert not seen[0][1].any()


@pytest.mark.parametrize("pad", [(0, 0, 0, 8), (4, 0, 8, 0), (16, 16, 16, 16), 4])
def test_outpaint(model, original, pad):
    top, bottom, left, right = (pad,) * 4 if isinstance(pad, int) else pad
    (out, seen) = drawn_tokens(model, lambda m: m.outpaint(original, pad, CAPTION, n=2, seed=1))
    assert out.shape == (2, SIZE + top + bottom, SIZE + left + right, 3)
    np.testing.assert_array_equal(out[:, top : top + SIZE, left : left + SIZE], np.stack([original] * 2))
    drawn = sum((~kept).sum() for _, kept, _ in seen)
    cells = (SIDE + (top + bottom) // CELL) * (SIDE + (left + right) // CELL) - SIDE**2
    assert drawn == 2 * cells, "every new cell is drawn once"
    assert all(kept.any() for _, kept, _ in seen), "every window sees some known tokens"
    assert (out[0] != out[1]).any()


def test_windows_begin_near_the_image_and_cover_the_canvas():
    corners = editing.windows((10, 7), (4, 4), (3, 2))
    assert corners[0] == (3, 2)
    covered = np.zeros((10, 7), int)
    for y, x in corners:
        assert 0 <= y <= 6 and 0 <= x <= 3
        covered[y : y + 4, x : x + 4] += 1
    assert covered.all()


def test_marked_and_dilated_cells():
    mask = np.zeros((8, 8), bool)
    mask[5, 6] = True
    cells = editing.marked_cells(mask, 4, 4)
    assert np.argwhere(cells).tolist() == [[2, 3]]
    assert np.argwhere(editing.dilated(cells, 1)).tolist() == [[1, 2], [1, 3], [2, 2], [2, 3], [3, 2], [3, 3]]
    np.testing.assert_array_equal(editing.dilated(cells, 0), cells)


def test_invalid_edits_are_rejected(model, original):
    mask = np.ones((SIZE, SIZE), bool)
    for call, error, words in (
        (lambda: model.inpaint(original, mask[:8], CAPTION), DataError, r"\(8, 16\)"),
        (lambda: model.inpaint(original, ~mask, CAPTION), DataError, "mask"),
        (lambda: model.inpaint(original, mask, " "), DataError, "' '"),
        (lambda: model.inpaint(original, mask, CAPTION, dilate=-1), ConfigError, "dilate"),
        (lambda: model.inpaint(original, mask, CAPTION, heat=1), ConfigError, "heat"),
        (lambda: model.inpaint(original, mask, CAPTION, n=0), ConfigError, "n is 0"),
        (lambda: model.vary(original, 0.0, CAPTION), ConfigError, "strength"),
        (lambda: model.outpaint(original, 3, CAPTION), ConfigError, "pad is 3"),
        (lambda: model.outpaint(original, (0, 0, 0, 0), CAPTION), ConfigError, r"\(0, 0"),
        (lambda: model.complete(original, 5, CAPTION), ConfigError, "rows is 5"),
    ):
        with pytest.raises(error, match=words):
            call()
    raster = AutoregressivePrior(model.prior.layout, AutoregressiveOptions(TRUNK, kernel=3))
    one_way = dataclasses.replace(model, prior=raster)
    for call in (
        lambda: one_way.inpaint(original, mask, CAPTION),
        lambda: one_way.vary(original, 0.5, CAPTION),
        lambda: one_way.outpaint(original, 4, CAPTION),
    ):
        with pytest.raises(ConfigError, match="maskgit.py"):
            call()


def test_a_prior_of_any_order_can_edit(model, original):
    any_order = AutoregressivePrior(
        model.prior.layout, AutoregressiveOptions(TRUNK, attention="full", order="random", kernel=3)
    )
    params = nn.meta.unbox(jax.jit(any_order.init)(jax.random.key(0)))
    free = dataclasses.replace(model, prior=any_order, params=params)
    mask = np.zeros((SIZE, SIZE), bool)
    mask[:CELL, :CELL] = True
    out = free.inpaint(original, mask, CAPTION, n=6)
    assert (out[:, 2 * CELL :] == original[2 * CELL :]).all()
    assert len({image.tobytes() for image in out}) > 1, "some tokens of this random decoder look alike, but not all"
