"""One edit of an image as data: applied to a model, and stored next to a manifest.

<folder>/input.png    the given image
<folder>/mask.png     white where `inpaint` draws; only with that method
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from dalle_jax.configuration.values import shown
from dalle_jax.errors import DataError
from dalle_jax.reporting.images import png
from dalle_jax.text_to_image import inputs
from dalle_jax.text_to_image.text_to_image import TextToImage

# Method of `TextToImage`: the argument that it needs in addition to the image and the caption.
METHODS = {"complete": "rows", "inpaint": "mask", "outpaint": "pad", "vary": "strength"}
_INPUT, _MASK = "input.png", "mask.png"


@dataclasses.dataclass(frozen=True)
class Edit:
    """An edit of an image.

    Attributes:
      method: one of `METHODS`.
      image: the given image, uint8 [H, W, 3].
      argument: the argument of the method: token rows to keep, a mask (bool [H, W] or [S, S]), pixels at the (top,
        bottom, left, right), or the share of the tokens to draw again.
    """

    method: str
    image: np.ndarray
    argument: Any

    def apply(self, model: TextToImage, caption: str, n: int, seed: int, **sampling: Any) -> np.ndarray:
        """Draws n edited images, uint8 [n, H', W', 3]. Errors as in the method of `TextToImage`.

        `vary` needs no caption; "" stands for none.
        """
        words = None if self.method == "vary" and not caption.strip() else caption
        given = {"image": self.image, METHODS[self.method]: self.argument, "caption": words, "n": n, "seed": seed}
        return getattr(model, self.method)(**given, **sampling)

    def record(self) -> dict[str, Any]:
        """Returns the entry of a manifest."""
        stored = _MASK if self.method == "inpaint" else self.argument
        return {"method": self.method, "image": _INPUT, METHODS[self.method]: stored}

    def files(self) -> dict[str, bytes]:
        """Returns the contents of the files that the entry names, by file name."""
        files = {_INPUT: png(self.image)}
        if self.method == "inpaint":
            files[_MASK] = png(np.where(self.argument, 255, 0).astype(np.uint8))
        return files


def read(record: Mapping[str, Any], folder: epath.PathLike) -> Edit:
    """Reads an edit from the entry of a manifest, and its files from the manifest's folder.

    Raises:
      DataError: the entry is damaged, or a file is missing or no image.
    """
    method = record.get("method")
    if method not in METHODS:
        raise DataError(f"The edit of a manifest is {shown(method)}; expected one of {', '.join(METHODS)}.")
    folder, name = epath.Path(folder), METHODS[method]
    image = inputs.one(str(folder / _INPUT))
    if method == "inpaint":
        return Edit(method, image, inputs.one(str(folder / _MASK)).any(-1))
    if name not in record:
        raise DataError(f"The edit of a manifest lacks {name!r}, the argument of {method}.")
    argument = record[name]
    return Edit(method, image, tuple(argument) if isinstance(argument, list) else argument)
