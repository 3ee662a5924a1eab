"""Edits of a given picture: complete, inpaint, outpaint, vary (MaskGIT, section 4.3; DALL-E, figure 2).

An edit encodes the picture, marks the cells of the token grid that are drawn anew, draws those beside the given tokens,
and puts the given pixels back over whatever lies outside.

    N = h·w cells    H, W pixels    f = H / h pixels a cell    n pictures drawn
"""

from __future__ import annotations

import numpy as np

from dalle_jax.errors import ConfigError, DataError


class Editing:
    """The editing half of `TextToImage`."""

    def complete(self, image: np.ndarray, rows: int, caption: str, n: int = 1, seed: int = 0, **options) -> np.ndarray:
        """Keeps the top rows of the token grid and draws the rest. Works with every prior.

        Args:
          image: uint8 [H, W, 3].
          rows: how many of the h token rows are given; h gives the picture back.
          caption: what the whole picture shows.
          n: completions.
          seed, **options: as in `generate`.

        Returns:
          uint8 [n, H, W, 3]; the given tokens and their pixels are unchanged.

        Raises:
          DataError: an empty caption, a picture of another size.
          ConfigError: rows outside [0, h].
        """
        layout = self.prior.layout
        if not 0 <= rows <= layout.height:
            raise ConfigError(
                f"rows is {rows}; this model's token grid has {layout.height} rows: give 0 to {layout.height}."
            )
        cells = np.zeros((layout.height, layout.width), bool)
        cells[rows:] = True
        return self._redraw(image, cells[None], cells[None], caption, n, seed, options)

    def inpaint(
        self, image: np.ndarray, mask: np.ndarray, caption: str, n: int = 1, seed: int = 0, dilate: int = 1, **options
    ) -> np.ndarray:
        """Draws the marked part of a picture anew, to fit its surroundings and the caption.

        Args:
          image: uint8 [H, W, 3].
          mask: bool [H, W] (or numbers: not 0), True where to draw. All of it is drawing from nothing.
          caption: what the whole picture shows; another one than before changes what the marked part shows.
          n: pictures.
          seed, **options: as in `generate`.
          dilate: by how many cells the marked cells grow, so that no token that saw the old content stays.

        Returns:
          uint8 [n, H, W, 3]; outside the dilated cells pixels and tokens are those given.

        Raises:
          ConfigError: a prior that draws in raster order cannot see what comes after a gap.
          DataError: an empty caption, a picture or mask of another size, a mask that marks nothing.
        """
        self._needs_any_order("inpaint")
        mask = np.asarray(mask)
        if mask.shape != (self.image_size, self.image_size):
            raise DataError(f"The mask is {mask.shape}; expected one value a pixel, {(self.image_size,) * 2}.")
        if not mask.any():
            raise DataError("The mask marks nothing: set it to True where the picture should be drawn anew.")
        if dilate < 0:
            raise ConfigError(f"dilate is {dilate}; expected 0 or more cells.")
        layout = self.prior.layout
        cells = dilated(marked_cells(mask, layout.height, layout.width), dilate)
        return self._redraw(image, cells[None], cells[None], caption, n, seed, options)

    def vary(self, image: np.ndarray, strength: float, caption: str, n: int = 1, seed: int = 0, **options):
        """Draws a random share of the tokens anew, another one for each picture.

        Args:
          image: uint8 [H, W, 3].
          strength: share of the tokens in (0, 1]; 1 keeps nothing.
          caption: what the whole picture shows.
          n: pictures.
          seed, **options: as in `generate`.

        Returns:
          uint8 [n, H, W, 3]; pixels more than one cell away from every new token are those given.

        Raises:
          ConfigError: strength outside (0, 1], or a prior that draws in raster order.
          DataError: an empty caption, a picture of another size.
        """
        self._needs_any_order("vary")
        if not 0 < strength <= 1:
            raise ConfigError(f"strength is {strength}; expected a share in (0, 1] of the tokens to draw anew.")
        layout = self.prior.layout
        count = max(1, round(strength * layout.image_length))
        order = np.stack([np.random.default_rng((seed, i)).permutation(layout.image_length) for i in range(n)])
        cells = (order < count).reshape(n, layout.height, layout.width)
        return self._redraw(image, cells, np.stack([dilated(c, 1) for c in cells]), caption, n, seed, options)

    def outpaint(
        self,
        image: np.ndarray,
        pad: int | tuple[int, int, int, int],
        caption: str,
        n: int = 1,
        seed: int = 0,
        **options,
    ) -> np.ndarray:
        """Extends the canvas around a picture.

        The larger token grid is filled window by window, each as large as the grid the prior knows, those nearest the
        given picture first; each sees what the earlier ones drew.

        Args:
          image: uint8 [H, W, 3].
          pad: pixels to add at the (top, bottom, left, right), or one number for all; multiples of f.
          caption: what the whole canvas shows.
          n: pictures.
          seed, **options: as in `generate`.

        Returns:
          uint8 [n, H + top + bottom, W + left + right, 3]; the given picture stands in it unchanged.

        Raises:
          ConfigError: a pad that is negative, all zero, or not a multiple of f; a prior that draws in raster order.
          DataError: an empty caption, a picture of another size.
        """
        self._needs_any_order("outpaint")
        pad = (pad,) * 4 if isinstance(pad, int) else tuple(pad)
        layout, f = self.prior.layout, self.image_size // self.prior.layout.height
        if len(pad) != 4 or min(pad) < 0 or not any(pad) or any(side % f for side in pad):
            raise ConfigError(
                f"pad is {pad}; expected pixels at the top, bottom, left and right, each a multiple of {f}, and one "
                "above 0."
            )
        top, bottom, left, right = (side // f for side in pad)
        h, w = layout.height, layout.width
        tokens = np.zeros((n, h + top + bottom, w + left + right), np.int32)
        known = np.zeros(tokens.shape[1:], bool)
        tokens[:, top : top + h, left : left + w] = self.encode(np.asarray(image)[None]).reshape(1, h, w)
        known[top : top + h, left : left + w] = True
        for number, (y, x) in enumerate(windows(known.shape, (h, w), (top, left))):
            place = (slice(y, y + h), slice(x, x + w))
            if known[place].all():
                continue
            given = (tokens[(slice(None), *place)].reshape(n, -1), np.tile(known[place].reshape(1, -1), (n, 1)))
            drawn = self._draw(caption, n, seed, options, given, window=number)
            tokens[(slice(None), *place)] = drawn.reshape(n, h, w)
            known[place] = True
        canvas = self.decode_grid(tokens)
        canvas[:, pad[0] : pad[0] + self.image_size, pad[2] : pad[2] + self.image_size] = image
        return canvas

    # -- what they share ------------------------------------------------------------------------------------------

    def _needs_any_order(self, what: str) -> None:
        if not self.prior.any_order:
            raise ConfigError(
                f"{what} needs a prior that can draw a token given later ones (configs/maskgit.py); "
                f"{self.workdir or 'this model'} holds the {self.prior.name} one in raster order, which sees earlier "
                "tokens only. Use complete() with it."
            )

    def _redraw(self, image, cells, changed, caption, n, seed, options) -> np.ndarray:
        """Draws `cells` anew and puts the given pixels back outside `changed`, both bool [n or 1, h, w]."""
        image = np.asarray(image)
        given = self.encode(image[None])
        rows = np.broadcast_to(~cells.reshape(len(cells), -1), (n, given.shape[1]))
        known = (np.broadcast_to(given, rows.shape), rows)
        tokens = self._draw(caption, n, seed, options, known)
        return np.where(pixels_of(changed, self.image_size)[..., None], self.decode(tokens), image[None])


def marked_cells(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """The cells that hold a marked pixel: [H, W] to bool [h, w]."""
    blocks = np.asarray(mask).astype(bool).reshape(height, mask.shape[0] // height, width, mask.shape[1] // width)
    return blocks.any((1, 3))


def pixels_of(cells: np.ndarray, size: int) -> np.ndarray:
    """Marked cells to marked pixels: bool [..., h, w] to [..., size, size]."""
    cell = size // cells.shape[-1]
    return cells.repeat(cell, axis=-2).repeat(cell, axis=-1)


def dilated(cells: np.ndarray, by: int) -> np.ndarray:
    """Bool [h, w] grown by `by` cells in all eight directions."""
    height, width = cells.shape
    padded = np.pad(cells, by)
    shifts = [padded[y : y + height, x : x + width] for y in range(2 * by + 1) for x in range(2 * by + 1)]
    return np.any(shifts, axis=0)


def windows(canvas: tuple[int, int], size: tuple[int, int], start: tuple[int, int]) -> list[tuple[int, int]]:
    """Top-left corners of windows that cover a canvas, half a window apart, nearest to `start` first."""
    steps = []
    for whole, part, origin in zip(canvas, size, start):
        stride = max(1, part // 2)
        places = {*range(origin, whole - part + 1, stride), *range(origin, -1, -stride), 0, whole - part}
        steps.append(sorted(places))
    corners = [(y, x) for y in steps[0] for x in steps[1]]
    return sorted(corners, key=lambda corner: (abs(corner[0] - start[0]) + abs(corner[1] - start[1]), corner))
