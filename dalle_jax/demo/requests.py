"""Requests of the page: what a visitor asks for, checked before a model sees it.

A request comes from the network. Sizes are therefore bounded here, images are decoded from their bytes and never from a
path, and sampling parameters are checked by the library where they are used.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dalle_jax.configuration.values import natural, shown
from dalle_jax.data.sources.decoding import Limits, decode_image
from dalle_jax.data.sources.record import Record
from dalle_jax.errors import ConfigError, DataError
from dalle_jax.jobs.edits import METHODS, Edit
from dalle_jax.text_to_image.text_to_image import TextToImage

MOST_IMAGES = 16  # of a caption and a run
MOST_CANDIDATES = 64
MOST_CHARACTERS = 1000  # of a caption
MOST_BYTES = 8 * 2**20  # of an uploaded image file
_MOST_PIXELS = 32_000_000
_MOST_CELLS = 256  # of a side of a mask
SAMPLING = ("temperature", "top_k", "top_p", "guidance", "guidance_schedule", "steps", "choice_temperature")


@dataclasses.dataclass(frozen=True)
class Request:
    """A checked request.

    Attributes:
      caption: describes the images.
      negative: a caption to lead away from, or None.
      n: images to show for each run.
      seed: as in `TextToImage.generate`.
      candidates: images to draw for each run, of which CLIP keeps n; 0 draws n without CLIP.
      sampling: the sampling parameters that are set.
      runs: names of the runs that draw.
      method: "generate", or one of `edits.METHODS`.
      image: the image to edit, uint8 [H, W, 3], or None.
      mask: cells to draw again, bool [h, w], or None.
      pad: cells to add at the (top, bottom, left, right).
      strength: share of the tokens to draw again.
      rows: token rows to keep.
    """

    caption: str
    negative: str | None
    n: int
    seed: Any
    candidates: int
    sampling: Mapping[str, Any]
    runs: tuple[str, ...]
    method: str = "generate"
    image: np.ndarray | None = None
    mask: np.ndarray | None = None
    pad: tuple[int, ...] = (0, 0, 0, 0)
    strength: Any = 0.3
    rows: Any = 0

    def edit(self, model: TextToImage) -> Edit:
        """Returns the edit for a model: cells become its pixels."""
        layout, size = model.prior.layout, model.image_size
        if self.method == "inpaint":
            place = lambda count: np.arange(size) * count // size
            argument = self.mask[place(self.mask.shape[0])[:, None], place(self.mask.shape[1])[None]]
        elif self.method == "outpaint":
            argument = tuple(cells * (size // layout.height) for cells in self.pad)
        else:
            argument = self.rows if self.method == "complete" else self.strength
        return Edit(self.method, self.image, argument)


def parse(given: Any, runs: Sequence[str]) -> Request:
    """Checks a request.

    Args:
      given: the JSON object that the page sent.
      runs: names of the runs that the page shows.

    Raises:
      ConfigError: an unknown field, run or method, or a number out of range.
      DataError: a caption that is too long or no text, or an image or a mask that cannot be read.
    """
    if not isinstance(given, Mapping):
        raise DataError(f"The request is {shown(given)}; expected a JSON object.")
    known = {field.name for field in dataclasses.fields(Request)}
    if unknown := sorted(set(given) - known):
        raise ConfigError(f"A request has no field {unknown[0]!r}; expected some of {', '.join(sorted(known))}.")
    method, sampling = given.get("method", "generate"), given.get("sampling") or {}
    if method not in ("generate", *METHODS):
        raise ConfigError(f"method is {shown(method)}; expected generate, {', '.join(METHODS)}.")
    if not isinstance(sampling, Mapping) or set(sampling) - set(SAMPLING):
        raise ConfigError(f"sampling is {shown(sampling)}; expected some of {', '.join(SAMPLING)}.")
    if not isinstance(schedule := sampling.get("guidance_schedule"), str | None):
        raise ConfigError(f"guidance_schedule is {shown(schedule)}; expected the name of a schedule, or null.")
    image = given.get("image")
    if method != "generate" and image is None:
        raise DataError(f"{method} needs an image: upload one, or choose “Edit” at an image that was drawn.")
    return Request(
        caption=_text("caption", given.get("caption", "")),
        negative=_text("negative", given.get("negative") or "").strip() or None,
        n=natural("n", given.get("n", 4), 1, MOST_IMAGES),
        seed=given.get("seed", 0),
        candidates=natural("candidates", given.get("candidates", 0), 0, MOST_CANDIDATES),
        sampling={name: value for name, value in sampling.items() if value is not None},
        runs=_runs(given.get("runs"), runs),
        method=method,
        image=None if method == "generate" else decoded(image),
        mask=_mask(given.get("mask")) if method == "inpaint" else None,
        pad=_pad(given.get("pad")) if method == "outpaint" else (0, 0, 0, 0),
        strength=given.get("strength", 0.3),
        rows=given.get("rows", 0),
    )


def decoded(given: Any) -> np.ndarray:
    """Decodes an image file in base64: uint8 [H, W, 3].

    Raises:
      DataError: no base64, too many bytes or pixels, or no image.
    """
    if not isinstance(given, str):
        raise DataError(f"The image is {shown(given)}; expected the bytes of an image file in base64.")
    if len(given) > MOST_BYTES * 4 // 3 + 4:
        raise DataError(f"The image has more than {MOST_BYTES // 2**20} MiB. Make it smaller first.")
    try:
        content = base64.b64decode(given, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"The image is not base64: {error}.") from error
    limits = Limits(max_pixels=_MOST_PIXELS, max_file_bytes=MOST_BYTES)
    return decode_image(Record(content, (), "The image", {}), limits)


def _text(name: str, given: Any) -> str:
    if not isinstance(given, str):
        raise DataError(f"{name} is {shown(given)}; expected a text.")
    if len(given) > MOST_CHARACTERS:
        raise DataError(f"{name} has {len(given)} characters; expected at most {MOST_CHARACTERS}.")
    return given


def _runs(given: Any, runs: Sequence[str]) -> tuple[str, ...]:
    if not isinstance(given, list) or not given or not all(name in runs for name in given):
        raise ConfigError(f"runs is {shown(given)}; expected at least one of {', '.join(runs)}.")
    return tuple(dict.fromkeys(given))


def _pad(given: Any) -> tuple[int, ...]:
    if not isinstance(given, list) or len(given) != 4:
        raise ConfigError(f"pad is {shown(given)}; expected the cells at the top, bottom, left and right.")
    return tuple(natural("pad", cells, 0, _MOST_CELLS) for cells in given)


def _mask(given: Any) -> np.ndarray:
    """Returns the marked cells, bool [h, w], of {"height": h, "width": w, "bits": hexadecimal digits, row by row}."""
    if not isinstance(given, Mapping):
        raise DataError("Mark the part of the image to draw again with the brush.")
    height, width = (natural(f"mask.{name}", given.get(name), 1, _MOST_CELLS) for name in ("height", "width"))
    try:
        content = bytes.fromhex(str(given.get("bits")))
    except ValueError as error:
        raise DataError(f"mask.bits: {error}.") from error
    bits = np.unpackbits(np.frombuffer(content, np.uint8))
    if len(bits) != 8 * -(-height * width // 8):
        raise DataError(f"mask.bits holds {len(bits)} bits; expected those of {height} x {width} cells.")
    return bits[: height * width].reshape(height, width).astype(bool)
