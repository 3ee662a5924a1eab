"""Edits of a given image: complete, inpaint, outpaint, vary (MaskGIT, section 4.3; DALL-E, figure 2).

An edit encodes the image and marks the cells of the token grid to draw again. The prior draws those cells given the
other tokens. The given pixels are then put back outside the cells that changed.

    N = h·w cells    H, W pixels    f = H / h pixels per cell    C captions    n images drawn for each
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dalle_jax.configuration.values import finite, is_whole, natural, shown
from dalle_jax.errors import ConfigError, DataError
from dalle_jax.priors.token_prior import TokenPrior
from dalle_jax.text_to_image import drawing, inputs
from dalle_jax.text_to_image.output import Images, check_output, converted
from dalle_jax.text_to_image.sampling_parameters import by_name

_MOST_PADDING = 64  # times the size of the image, at each side


class Edits:
    """The edits of `TextToImage`, on top of its encoding, drawing and decoding. Each returns the images that it draws.

    Attributes:
      prior: draws image tokens.
      image_size: H = W, pixels.
      workdir: the workdir that the model was loaded from, for messages.
      fit: how a given image that is not square becomes one.
      on_frame: called with the images while they are drawn, or None.
    """

    prior: TokenPrior
    image_size: int
    workdir: str
    fit: str
    on_frame: Callable[[drawing.Frame], None] | None

    @by_name
    def complete(
        self,
        image: np.ndarray,
        rows: int,
        caption: str | Sequence[str],
        n: int = 1,
        seed: int = 0,
        output: str = "numpy",
        **sampling: Any,
    ) -> Images:
        """Keeps the top rows of the token grid and draws the rest. Works with every prior.

        Args:
          image: an image of any size, see `encode`.
          rows: token rows to keep, 0 to h. One row is H / h pixels high.
          caption: describes the whole image. Or a sequence of C captions, to draw n images for each.
          n: images to draw.
          seed: as in `generate`.
          output: "numpy" or "pil", as in `generate`.
          **sampling: the sampling parameters.

        Returns:
          uint8 [n, H, W, 3], or [C, n, H, W, 3] for a sequence. The kept tokens and their pixels are unchanged.

        Raises:
          DataError: an empty caption, or no image, see `encode`.
          ConfigError: rows outside [0, h], or a sampling parameter out of range.
        """
        check_output(output)
        n, seed = drawing.check_count(n, seed)
        caption, lead = _with_axes(caption, n)
        layout = self.prior.layout
        rows = natural("rows", rows, most=layout.height)
        image = inputs.image(image, self.image_size, self.fit)
        cells = np.zeros((layout.height, layout.width), bool)
        cells[rows:] = True
        return converted(_redraw(self, image, cells[None], cells[None], caption, lead, seed, sampling), output)

    @by_name
    def inpaint(
        self,
        image: np.ndarray,
        mask: np.ndarray,
        caption: str | Sequence[str],
        n: int = 1,
        seed: int = 0,
        dilate: int = 1,
        output: str = "numpy",
        **sampling: Any,
    ) -> Images:
        """Draws the marked part of an image again, so that it fits the surroundings and the caption.

        Args:
          image: an image of any size, see `encode`.
          mask: True, or white, where to draw: bool or numbers [H, W], a PIL image or a path. It has the size of the
            given image or of the model's images. A mask that is True everywhere keeps nothing of the image.
          caption: describes the whole image. Another caption than before changes the content of the marked part. Or a
            sequence of C captions, to draw n images for each.
          n: images to draw.
          seed: as in `generate`.
          dilate: number of cells by which the marked cells grow, so that no token that saw the old content stays.
          output: "numpy" or "pil", as in `generate`.
          **sampling: the sampling parameters.

        Returns:
          uint8 [n, H, W, 3], or [C, n, H, W, 3] for a sequence. Outside the dilated cells, pixels and tokens are
          unchanged.

        Raises:
          ConfigError: the prior draws in raster order, so that it cannot see tokens after the hole; or `dilate` or a
            sampling parameter is out of range.
          DataError: an empty caption, no image, a mask of another size, or one that marks nothing.
        """
        _check_any_order(self, "inpaint")
        check_output(output)
        n, seed = drawing.check_count(n, seed)
        caption, lead = _with_axes(caption, n)
        layout = self.prior.layout
        dilate = min(natural("dilate", dilate), max(layout.height, layout.width))
        given = inputs.one(image)
        image = inputs.squared(given, self.image_size, self.fit)
        mask = inputs.mask(mask, given.shape[:2], self.image_size, self.fit)
        if not mask.any():
            raise DataError("The mask marks nothing: set it to True where the image should be drawn again.")
        cells = dilated(marked_cells(mask, layout.height, layout.width), dilate)
        return converted(_redraw(self, image, cells[None], cells[None], caption, lead, seed, sampling), output)

    @by_name
    def vary(
        self,
        image: np.ndarray,
        strength: float,
        caption: str | Sequence[str] | None = None,
        n: int = 1,
        seed: int = 0,
        output: str = "numpy",
        **sampling: Any,
    ) -> Images:
        """Draws a random share of the tokens again; the share is another one for each of the n images.

        Args:
          image: an image of any size, see `encode`.
          strength: share of the tokens to draw, in (0, 1]; 1 keeps nothing.
          caption: describes the whole image. Or a sequence of C captions, to draw n images for each. None stands for
            the empty caption, so that the kept tokens alone decide.
          n: images to draw.
          seed: as in `generate`.
          output: "numpy" or "pil", as in `generate`.
          **sampling: the sampling parameters.

        Returns:
          uint8 [n, H, W, 3], or [C, n, H, W, 3] for a sequence. Pixels more than one cell away from every new token are
          unchanged.

        Raises:
          ConfigError: strength outside (0, 1], a prior in raster order, or a sampling parameter out of range.
          DataError: an empty caption, or no image, see `encode`.
        """
        _check_any_order(self, "vary")
        check_output(output)
        n, seed = drawing.check_count(n, seed)
        caption, lead = (None, (n,)) if caption is None else _with_axes(caption, n)
        strength = finite("strength", strength, above=0, high=1)
        image = inputs.image(image, self.image_size, self.fit)
        layout = self.prior.layout
        count = max(1, round(strength * layout.image_length))
        order = np.stack([np.random.default_rng((seed, i)).permutation(layout.image_length) for i in range(n)])
        cells = (order < count).reshape(n, layout.height, layout.width)
        changed = np.stack([dilated(c, 1) for c in cells])
        return converted(_redraw(self, image, cells, changed, caption, lead, seed, sampling), output)

    @by_name
    def outpaint(
        self,
        image: np.ndarray,
        pad: int | tuple[int, int, int, int],
        caption: str | Sequence[str],
        n: int = 1,
        seed: int = 0,
        output: str = "numpy",
        **sampling: Any,
    ) -> Images:
        """Extends the canvas around an image.

        The larger token grid is filled window by window. Each window has the size of the grid that the prior was
        trained on. Windows near the given image come first, so that later ones see what earlier ones drew.

        Args:
          image: an image of any size, see `encode`.
          pad: pixels to add at the (top, bottom, left, right), or one number for all four sides. Each is a multiple of
            f = H / h, the pixels per cell.
          caption: describes the whole canvas. Or a sequence of C captions, to draw n images for each.
          n: images to draw.
          seed: as in `generate`.
          output: "numpy" or "pil", as in `generate`.
          **sampling: the sampling parameters.

        Returns:
          uint8 [n, H + top + bottom, W + left + right, 3], with C in front for a sequence. The given image stands in it
          unchanged.

        Raises:
          ConfigError: a pad that is negative, all zero or not a multiple of f, a prior in raster order, or a sampling
            parameter out of range.
          DataError: an empty caption, or no image, see `encode`.
        """
        _check_any_order(self, "outpaint")
        check_output(output)
        n, seed = drawing.check_count(n, seed)
        caption, lead = _with_axes(caption, n)
        layout, f = self.prior.layout, self.image_size // self.prior.layout.height
        pad = _padding(pad, f, self.image_size)
        image = inputs.image(image, self.image_size, self.fit)
        top, bottom, left, right = (side // f for side in pad)
        h, w = layout.height, layout.width
        tokens = np.zeros((*lead, h + top + bottom, w + left + right), np.int32)
        known = np.zeros(tokens.shape[-2:], bool)
        tokens[..., top : top + h, left : left + w] = self.encode(image[None]).reshape(h, w)
        known[top : top + h, left : left + w] = True
        model = dataclasses.replace(self, on_frame=None)  # a frame for each window
        canvas = functools.partial(_canvas, model, tokens, known, image, (top, left))
        for number, (y, x) in enumerate(windows(known.shape, (h, w), (top, left))):
            place = (..., slice(y, y + h), slice(x, x + w))
            if known[place].all():
                continue
            given = tokens[place].reshape(*lead, -1)
            given = (given, np.broadcast_to(known[place].reshape(-1), given.shape))
            drawn = model.draw_tokens(caption, n, seed, given, window=number, **sampling)
            tokens[place] = drawn.reshape(*lead, h, w)
            known[place] = True
            if self.on_frame and not known.all():
                of_captions = lambda images: images if images.ndim == 5 else images[None]
                self.on_frame(drawing.Frame(0, 0, float(known.mean()), canvas).changed(of_captions))
        return converted(canvas(), output)


def _canvas(model: Edits, tokens: np.ndarray, known: np.ndarray, image: np.ndarray, start: tuple[int, int]):
    """Decodes canvases, int32 [..., h', w'], and puts the given image into each: uint8 [..., f·h', f·w', 3].

    Cells that are not known, bool [h', w'], are grey. `start` is the first cell of the given image.
    """
    size, f = model.image_size, model.image_size // model.prior.layout.height
    visible = known.repeat(f, axis=0).repeat(f, axis=1)[..., None]
    canvas = np.where(visible, model.decode_grid(tokens.reshape(-1, *known.shape)), np.uint8(drawing.GREY))
    y, x = (f * cell for cell in start)
    canvas[:, y : y + size, x : x + size] = image
    return canvas.reshape(*tokens.shape[:-2], *canvas.shape[1:])


def _with_axes(caption: str | Sequence[str], n: int) -> tuple[str | list[str], tuple[int, ...]]:
    """Returns one caption as it is and several as a list, and the axes of their images: (n,) or (C, n)."""
    if isinstance(caption, str):
        return caption, (n,)
    captions = inputs.captions(caption)
    if not captions:
        raise DataError("No caption was given; expected at least one.")
    return captions, (len(captions), n)


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


def _check_any_order(model: Edits, edit: str) -> None:
    """Raises ConfigError if the prior cannot draw a token given later ones."""
    if not model.prior.any_order:
        raise ConfigError(
            f"{edit} needs a prior that can draw a token given later ones (configs/maskgit.py, or configs/prior.py "
            "with --config.model.order=random). "
            f"{model.workdir or 'This model'} holds the {model.prior.name} prior in raster order, which sees only "
            "earlier tokens. Use complete() with it."
        )


def _redraw(model: Edits, image, cells, changed, caption, lead, seed, sampling) -> np.ndarray:
    """Draws `cells` again and keeps the given pixels outside `changed`, both bool [n or 1, h, w].

    `lead` are the axes of the images of `caption`; n is the last one.
    """
    given = model.encode(image[None])
    rows = np.broadcast_to(~cells.reshape(len(cells), -1), (*lead, given.shape[1]))
    known = (np.broadcast_to(given, rows.shape), rows)
    drawn = np.broadcast_to(pixels_of(changed, model.image_size)[..., None], (lead[-1], *image.shape[:2], 1))
    compose = lambda images, first=0: np.where(drawn[first : first + images.shape[-4]], images, image)
    if on_frame := model.on_frame:
        composed = lambda frame: frame.changed(lambda images: compose(images, frame.candidate))
        model = dataclasses.replace(model, on_frame=lambda frame: on_frame(composed(frame)))
    tokens = model.draw_tokens(caption, lead[-1], seed, known, **sampling)
    return compose(model.decode(tokens.reshape(-1, given.shape[1])).reshape(*lead, *image.shape))


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
