"""Captions, images, masks and tokens as callers give them: checked, and converted where the meaning is plain.

An image may be:

    a path                       any file that training reads, local or "gs://…"
    a PIL image                  of any mode; transparent parts become white, as in training
    an array (NumPy, JAX, …)     [H, W, 3], RGBA [H, W, 4] or grey [H, W, 1] or [H, W]; channels may come first
      whole numbers              in [0, 255]
      floats                     in [0, 1]

Where one image is expected, a batch axis of length 1 is dropped. An image of another size is cropped to its centre
square (or padded with white, if the model was trained with `data.fit=pad`) and resized by area, as in training.

    H, W size of the given image    S size of the model's images    B images    f·h = S
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import PIL.Image

from dalle_jax.configuration.values import shown
from dalle_jax.data.augment import augment, fit_square
from dalle_jax.data.sources.decoding import Limits, decode_image, read_header, upright_rgb
from dalle_jax.data.sources.record import Record
from dalle_jax.errors import DataError
from dalle_jax.storage.files import expanded

_CHANNELS = (1, 3, 4)
_FORMS = "expected a path, a PIL image, or an array [H, W, 3] of uint8 or of floats in [0, 1]"
_SLACK = 1e-4  # of floats in [0, 1], which a decoder or a resize may round beyond the ends


# -- captions -----------------------------------------------------------------------------------------------------


def captions(given: Any) -> list[str]:
    """Returns captions as a list; a single string is one caption.

    Raises:
      DataError: something else than strings.
    """
    if isinstance(given, str):
        return [given]
    try:
        each = None if isinstance(given, bytes) else list(given)
    except TypeError:
        each = None
    if each is None:
        raise DataError(f"The captions are {shown(given)}; expected a string or a list of strings.")
    return [caption(text) for text in each]


def caption(given: Any) -> str:
    """Returns one caption; a `DataError` rejects something else than a string."""
    if not isinstance(given, str):
        remedy = "; decode it first (b.decode())" if isinstance(given, bytes) else ""
        raise DataError(f"A caption is {shown(given)}, {_kind(given)}; expected a string{remedy}.")
    return given


# -- images -------------------------------------------------------------------------------------------------------


def images(given: Any, size: int, fit: str = "crop") -> np.ndarray:
    """Converts images to the size of the model.

    Args:
      given: a batch [B, …], a list of images, or one image; see the module.
      size: S.
      fit: "crop" or "pad", see `data.augment.fit_square`.

    Returns:
      uint8 [B, S, S, 3].

    Raises:
      DataError: no image, or something else.
    """
    each = pixels_of_each(given, size)
    if not each:
        raise DataError("No image was given; expected at least one.")
    return np.stack([squared(pixels, size, fit) for pixels in each])


def pixels_of_each(given: Any, size: int | None = None) -> list[np.ndarray]:
    """Converts images, as for `images`, to uint8 [H, W, 3] without a change of size.

    Args:
      given: the images.
      size: S, so that a much larger photo may be decoded at a reduced size; None for the full size.
    """
    if are_images(given):
        each = given
    elif _is_image(given) and getattr(given, "ndim", 0) != 4:
        each = [given]
    else:
        array = _array(given)
        each = array if array.ndim == 4 else [array]
    return [_pixels(image, size) for image in each]


def image(given: Any, size: int, fit: str = "crop") -> np.ndarray:
    """Converts one image, as for `images`, to uint8 [S, S, 3].

    Raises:
      DataError: several images, or something else.
    """
    return squared(one(given, size), size, fit)


def one(given: Any, size: int | None = None) -> np.ndarray:
    """Converts one image, as for `pixels_of_each`, to uint8 [H, W, 3]."""
    each = pixels_of_each(given, size)
    if len(each) != 1:
        raise DataError(f"{len(each)} images were given; expected one. Call this method once for each.")
    return each[0]


def squared(pixels: np.ndarray, size: int, fit: str) -> np.ndarray:
    """Crops or pads, and resizes, as training does: uint8 [H, W, 3] to uint8 [S, S, 3]."""
    return augment(fit_square(pixels, fit), size, "none", None)


def _pixels(given: Any, size: int | None) -> np.ndarray:
    """Returns one image as uint8 [H, W, 3]."""
    if isinstance(given, PIL.Image.Image):
        try:
            return upright_rgb(given)
        except Exception as error:  # Pillow reads a file only now, and raises anything on damaged bytes
            raise DataError(f"The PIL image cannot be read: {type(error).__name__}: {error}.") from error
    if _is_file(given):
        return decode_image(_record(given), Limits(image_size=size))
    array = _array(given)
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim == 3 and array.shape[-1] not in _CHANNELS and array.shape[0] in _CHANNELS:
        array = np.moveaxis(array, 0, -1)
    if array.ndim != 3 or array.shape[-1] not in _CHANNELS or not array.size:
        raise DataError(f"The image is {array.dtype} {np.shape(given)}; {_FORMS}.")
    array = _to_uint8(array)
    if array.shape[-1] == 4:
        return upright_rgb(PIL.Image.fromarray(array))
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))


def _to_uint8(array: np.ndarray) -> np.ndarray:
    """Converts whole numbers in [0, 255] and floats in [0, 1] to uint8."""
    if array.dtype == np.uint8:
        return array
    kind = array.dtype.kind
    top, slack = (255, 0) if kind in "iu" else (1, _SLACK)
    if kind not in "iuf":
        raise DataError(f"The image is an array of {array.dtype}; {_FORMS}.")
    low, high = array.min(), array.max()
    if not (low >= -slack and high <= top + slack):  # NaN fails, too
        remedy = "Divide by 255, or convert to uint8." if kind == "f" and 1 < high <= 255 else "Scale it first."
        raise DataError(
            f"The image is {array.dtype} from {low:g} to {high:g}; expected numbers from 0 to {top}. {remedy}"
        )
    return array.astype(np.uint8) if top == 255 else np.rint(np.clip(array, 0, 1) * 255).astype(np.uint8)


# -- masks --------------------------------------------------------------------------------------------------------


def mask(given: Any, image_size: tuple[int, int], size: int, fit: str = "crop") -> np.ndarray:
    """Converts a mask to the size of the model.

    Args:
      given: a path, a PIL image or an array of numbers, [H, W] or with one channel. 0 (black) keeps a pixel, every
        other value draws it again. Its size is that of the image as it was given, or S.
      image_size: (H, W) of the image as it was given.
      size: S.
      fit: as for `images`. Padding is not marked.

    Returns:
      bool [S, S]. A pixel is marked if any marked pixel lies in it.

    Raises:
      DataError: something else, or another size.
    """
    marked = _marked(given)
    if marked.shape == (size, size):
        return marked
    if marked.shape != image_size:
        raise DataError(
            f"The mask is {marked.shape}; expected one value per pixel of the image, {image_size}, or of the model, "
            f"{(size, size)}."
        )
    if fit == "pad":
        side = max(image_size)
        square = np.zeros((side, side), bool)
        top, left = (side - image_size[0]) // 2, (side - image_size[1]) // 2
        square[top : top + image_size[0], left : left + image_size[1]] = marked
    else:
        side = min(image_size)
        top, left = (image_size[0] - side) // 2, (image_size[1] - side) // 2
        square = marked[top : top + side, left : left + side]
    return _any_of_each(_any_of_each(square, size).T, size).T


def _any_of_each(marked: np.ndarray, count: int) -> np.ndarray:
    """Splits the first axis into `count` equal intervals, and finds those that touch a marked row."""
    length = len(marked)
    return np.stack([marked[i * length // count : -(-(i + 1) * length // count)].any(0) for i in range(count)])


def _marked(given: Any) -> np.ndarray:
    """Returns a mask of any size, bool [H, W]."""
    if isinstance(given, PIL.Image.Image) or _is_file(given):
        header = given if isinstance(given, PIL.Image.Image) else read_header(_record(given))
        if header is not None and header.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
            raise DataError(
                "The mask has transparent parts, which may mean to draw or to keep. Give one channel: white where to "
                "draw, black elsewhere (mask.getchannel('A') is that of the transparency)."
            )
        return _pixels(given, None).any(-1)
    array = _array(given)
    if array.dtype.kind not in "biuf" or (array.dtype.kind == "f" and not np.isfinite(array).all()):
        raise DataError(f"The mask is {array.dtype} {array.shape}; expected finite numbers or bool [H, W].")
    while array.ndim > 2 and 1 in (array.shape[0], array.shape[-1]):
        array = array[0] if array.shape[0] == 1 else array[..., 0]
    if array.ndim != 2:
        raise DataError(f"The mask is {array.shape}; expected one value per pixel, [H, W].")
    return array != 0


# -- tokens -------------------------------------------------------------------------------------------------------


def tokens(given: Any, shape: tuple[int | None, ...], vocab: int) -> np.ndarray:
    """Checks image tokens.

    Args:
      given: whole numbers.
      shape: the expected lengths; None for any length of at least 1.
      vocab: V; tokens lie in [0, V).

    Returns:
      int32.

    Raises:
      DataError: another shape or type, or a token outside [0, V).
    """
    array = _array(given)
    fits = array.ndim == len(shape) and all(want in (None, have) for want, have in zip(shape, array.shape))
    if array.dtype.kind not in "iu" or not fits or not array.size:
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise DataError(f"The tokens are {array.dtype} {array.shape}; expected whole numbers of shape [{wanted}].")
    if array.min() < 0 or array.max() >= vocab:
        raise DataError(f"The tokens go from {array.min()} to {array.max()}; expected 0 to {vocab - 1}.")
    return array.astype(np.int32)


def known(given: Any, shape: tuple[int, ...], vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """Checks known tokens: (tokens [..., N], mask [..., N]). Where the mask is False, a token may be any number.

    Args:
      given: the two arrays.
      shape: [n, N] or [C, n, N].
      vocab: V.

    Returns:
      int32 [..., N] and bool [..., N].

    Raises:
      DataError: another shape or type, or a known token outside [0, V).
    """
    if not isinstance(given, list | tuple) or len(given) != 2:
        raise DataError(f"The known tokens are {shown(given)}; expected a pair of tokens and mask.")
    values, mask = map(_array, given)
    if mask.dtype != bool or mask.shape != shape:
        raise DataError(f"The mask of the known tokens is {mask.dtype} {mask.shape}; expected bool {shape}.")
    tokens(np.where(mask, values, 0) if values.shape == shape else values, shape, vocab)
    return values.astype(np.int32), mask


# -- any ----------------------------------------------------------------------------------------------------------


def _is_file(given: Any) -> bool:
    return isinstance(given, str | os.PathLike)


def are_images(given: Any) -> bool:
    """Returns whether a value is a list of images, and not an array in the form of lists."""
    return isinstance(given, list | tuple) and all(_is_image(each) for each in given)


def _is_image(given: Any) -> bool:
    """Returns whether an item of a list is an image, and not a row of numbers."""
    return _is_file(given) or isinstance(given, PIL.Image.Image) or getattr(given, "ndim", 0) >= 2


def _record(path: str | os.PathLike) -> Record:
    """Reads the file of an image."""
    try:
        file = expanded(path)
        if not file.is_file():
            raise DataError(f"There is no image file at {shown(str(path))}. Check the path.")
        return Record(file.read_bytes(), (), str(path), {})
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"The image {shown(str(path))} cannot be read: {error}.") from error


def _array(given: Any) -> np.ndarray:
    try:
        array = np.asarray(given)
        if array.dtype.kind == "V":  # bfloat16 and other small floats of JAX
            array = array.astype(np.float32)
    except Exception as error:  # lists of rows of different lengths, tensors on a GPU, …
        raise DataError(f"The value is {_kind(given)} and no array ({error}); {_FORMS}.") from error
    if array.dtype == object:
        raise DataError(f"The value is {_kind(given)}, {shown(given)}; {_FORMS}.")
    return array


def _kind(given: Any) -> str:
    return f"of type {type(given).__name__}"
