"""Edits of a given image: complete, inpaint, outpaint, vary (MaskGIT, section 4.3; DALL-E, figure 2).

An edit encodes the image and marks the cells of the token grid to draw again. The prior draws those cells given the
other tokens. The given pixels are then put back outside the cells that changed.

    N = h·w cells    H, W pixels    f = H / h pixels per cell    n images drawn
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from dalle_jax.configuration.values import finite, is_whole, natural, shown
from dalle_jax.errors import ConfigError, DataError
from dalle_jax.priors.token_prior import TokenPrior
from dalle_jax.text_to_image import drawing, inputs

_MOST_PADDING = 64  # times the size of the image, at each side


class Model(Protocol):
    """A text-to-image model as the edits need it; `TextToImage` is one.

    Attributes:
      prior: draws image tokens.
      image_size: H = W, pixels.
      workdir: the workdir that it was loaded from, for messages.
      fit: how a given image that is not square becomes one.
      on_frame: called with the images while they are drawn, or None.
    """

    @property
    def prior(self) -> TokenPrior: ...

    @property
    def image_size(self) -> int: ...

    @property
    def workdir(self) -> str: ...

    @property
    def fit(self) -> str: ...

    @property
    def on_frame(self) -> Callable[[drawing.Frame], None] | None: ...

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Encodes images, uint8 [B, H, W, 3], to tokens, int32 [B, N]."""

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Decodes tokens, int32 [B, N], to images, uint8 [B, H, W, 3]."""

    def decode_grid(self, tokens: np.ndarray) -> np.ndarray:
        """Decodes token grids of any size, int32 [B, h', w'], to images, uint8 [B, f·h', f·w', 3]."""

    def draw_tokens(
        self,
        caption: str,
        n: int,
        seed: int,
        known: tuple[np.ndarray, np.ndarray],
        window: int = 0,
        **sampling: Any,
    ) -> np.ndarray:
        """Draws the tokens of n images given some of them; see `TextToImage.draw_tokens`."""


def complete(
    model: Model, image: np.ndarray, rows: int, caption: str, n: int, seed: int, **sampling: Any
) -> np.ndarray:
    """Draws the token rows below the first `rows`; see `TextToImage.complete`."""
    n, seed = drawing.check_count(n, seed)
    layout = model.prior.layout
    rows = natural("rows", rows, most=layout.height)
    image = inputs.image(image, model.image_size, model.fit)
    cells = np.zeros((layout.height, layout.width), bool)
    cells[rows:] = True
    return _redraw(model, image, cells[None], cells[None], caption, n, seed, sampling)


def inpaint(
    model: Model, image: np.ndarray, mask: np.ndarray, caption: str, n: int, seed: int, dilate: int, **sampling: Any
) -> np.ndarray:
    """Draws the marked part of an image again; see `TextToImage.inpaint`."""
    _check_any_order(model, "inpaint")
    n, seed = drawing.check_count(n, seed)
    layout = model.prior.layout
    dilate = min(natural("dilate", dilate), max(layout.height, layout.width))
    given = inputs.one(image)
    image = inputs.squared(given, model.image_size, model.fit)
    mask = inputs.mask(mask, given.shape[:2], model.image_size, model.fit)
    if not mask.any():
        raise DataError("The mask marks nothing: set it to True where the image should be drawn again.")
    cells = dilated(marked_cells(mask, layout.height, layout.width), dilate)
    return _redraw(model, image, cells[None], cells[None], caption, n, seed, sampling)


def vary(
    model: Model, image: np.ndarray, strength: float, caption: str, n: int, seed: int, **sampling: Any
) -> np.ndarray:
    """Draws a random share of the tokens again; see `TextToImage.vary`."""
    _check_any_order(model, "vary")
    n, seed = drawing.check_count(n, seed)
    strength = finite("strength", strength, above=0, high=1)
    image = inputs.image(image, model.image_size, model.fit)
    layout = model.prior.layout
    count = max(1, round(strength * layout.image_length))
    order = np.stack([np.random.default_rng((seed, i)).permutation(layout.image_length) for i in range(n)])
    cells = (order < count).reshape(n, layout.height, layout.width)
    return _redraw(model, image, cells, np.stack([dilated(c, 1) for c in cells]), caption, n, seed, sampling)


def outpaint(
    model: Model,
    image: np.ndarray,
    pad: int | tuple[int, int, int, int],
    caption: str,
    n: int,
    seed: int,
    **sampling: Any,
) -> np.ndarray:
    """Extends the canvas around an image; see `TextToImage.outpaint`.

    The larger token grid is filled window by window. Each window has the size of the grid that the prior was trained
    on. Windows near the given image come first, so that later ones see what earlier ones drew.
    """
    _check_any_order(model, "outpaint")
    n, seed = drawing.check_count(n, seed)
    layout, f = model.prior.layout, model.image_size // model.prior.layout.height
    pad = _padding(pad, f, model.image_size)
    image = inputs.image(image, model.image_size, model.fit)
    top, bottom, left, right = (side // f for side in pad)
    h, w = layout.height, layout.width
    tokens = np.zeros((n, h + top + bottom, w + left + right), np.int32)
    known = np.zeros(tokens.shape[1:], bool)
    tokens[:, top : top + h, left : left + w] = model.encode(image[None]).reshape(1, h, w)
    known[top : top + h, left : left + w] = True
    on_frame, model = model.on_frame, dataclasses.replace(model, on_frame=None)  # a frame for each window
    for number, (y, x) in enumerate(windows(known.shape, (h, w), (top, left))):
        place = (slice(y, y + h), slice(x, x + w))
        if known[place].all():
            continue
        given = (tokens[(slice(None), *place)].reshape(n, -1), np.tile(known[place].reshape(1, -1), (n, 1)))
        drawn = model.draw_tokens(caption, n, seed, given, window=number, **sampling)
        tokens[(slice(None), *place)] = drawn.reshape(n, h, w)
        known[place] = True
        if on_frame and not known.all():
            images = functools.partial(_canvas, model, tokens, known, image, (top, left))
            on_frame(drawing.Frame(0, 0, float(known.mean()), images).changed(lambda canvas: canvas[None]))
    return _canvas(model, tokens, known, image, (top, left))


def _canvas(model: Model, tokens: np.ndarray, known: np.ndarray, image: np.ndarray, start: tuple[int, int]):
    """Decodes a canvas, int32 [n, h', w'], and puts the given image into it: uint8 [n, f·h', f·w', 3].

    Cells that are not known, bool [h', w'], are grey. `start` is the first cell of the given image.
    """
    size, f = model.image_size, model.image_size // model.prior.layout.height
    visible = known.repeat(f, axis=0).repeat(f, axis=1)[..., None]
    canvas = np.where(visible, model.decode_grid(tokens), np.uint8(drawing.GREY))
    y, x = (f * cell for cell in start)
    canvas[:, y : y + size, x : x + size] = image
    return canvas


def _padding(pad: Any, f: int, size: int) -> tuple[int, int, int, int]:
    """Checks the padding of `outpaint`, and returns the pixels at the top, bottom, left and right."""
    sides = tuple(pad) if isinstance(pad, Sequence | np.ndarray) and not isinstance(pad, str | bytes) else (pad,) * 4
    whole = len(sides) == 4 and all(is_whole(side) and 0 <= side <= _MOST_PADDING * size for side in sides)
    if not whole or not any(sides) or any(side % f for side in sides):
        raise ConfigError(
            f"pad is {shown(pad)}; expected pixels at the top, bottom, left and right, or one number for all. Each "
            f"must be a multiple of {f} and at most {_MOST_PADDING * size}, and at least one must be above 0."
        )
    return tuple(int(side) for side in sides)


def _check_any_order(model: Model, edit: str) -> None:
    """Raises ConfigError if the prior cannot draw a token given later ones."""
    if not model.prior.any_order:
        raise ConfigError(
            f"{edit} needs a prior that can draw a token given later ones (configs/maskgit.py, or configs/prior.py "
            "with --config.model.order=random). "
            f"{model.workdir or 'This model'} holds the {model.prior.name} prior in raster order, which sees only "
            "earlier tokens. Use complete() with it."
        )


def _redraw(model: Model, image, cells, changed, caption, n, seed, sampling) -> np.ndarray:
    """Draws `cells` again and keeps the given pixels outside `changed`, both bool [n or 1, h, w]."""
    given = model.encode(image[None])
    rows = np.broadcast_to(~cells.reshape(len(cells), -1), (n, given.shape[1]))
    known = (np.broadcast_to(given, rows.shape), rows)
    drawn = np.broadcast_to(pixels_of(changed, model.image_size)[..., None], (n, *image.shape[:2], 1))
    compose = lambda images, first=0: np.where(drawn[first : first + len(images)], images, image[None])
    if on_frame := model.on_frame:
        composed = lambda frame: frame.changed(lambda images: compose(images[0], frame.candidate)[None])
        model = dataclasses.replace(model, on_frame=lambda frame: on_frame(composed(frame)))
    return compose(model.decode(model.draw_tokens(caption, n, seed, known, **sampling)))


def marked_cells(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Finds the cells that hold a marked pixel: [H, W] to bool [h, w]."""
    blocks = np.asarray(mask).astype(bool).reshape(height, mask.shape[0] // height, width, mask.shape[1] // width)
    return blocks.any((1, 3))


def pixels_of(cells: np.ndarray, size: int) -> np.ndarray:
    """Enlarges marked cells to marked pixels: bool [..., h, w] to [..., size, size]."""
    cell = size // cells.shape[-1]
    return cells.repeat(cell, axis=-2).repeat(cell, axis=-1)


def dilated(cells: np.ndarray, by: int) -> np.ndarray:
    """Grows marked cells, bool [h, w], by `by` cells in all eight directions."""
    height, width = cells.shape
    padded = np.pad(cells, by)
    shifts = [padded[y : y + height, x : x + width] for y in range(2 * by + 1) for x in range(2 * by + 1)]
    return np.any(shifts, axis=0)


def windows(canvas: tuple[int, int], size: tuple[int, int], start: tuple[int, int]) -> list[tuple[int, int]]:
    """Returns the top-left corners of windows that cover a canvas, half a window apart, nearest to `start` first."""
    steps = []
    for whole, part, origin in zip(canvas, size, start):
        stride = max(1, part // 2)
        places = {*range(origin, whole - part + 1, stride), *range(origin, -1, -stride), 0, whole - part}
        steps.append(sorted(places))
    corners = [(y, x) for y in steps[0] for x in steps[1]]
    return sorted(corners, key=lambda corner: (abs(corner[0] - start[0]) + abs(corner[1] - start[1]), corner))
