"""How a MaskGIT prior draws and edits: its images after each decoding step, and edits of real images.

C captions    S decoding steps    H, W image size
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dalle_jax.priors.maskgit import MaskGITPrior
from dalle_jax.text_to_image.text_to_image import TextToImage

EDITS = ("real", "right half inpainted", "extended to the right", "a third varied", "drawn under the next caption")

Row = tuple[str, list[tuple[str, np.ndarray]]]  # heading, and images uint8 [H, W, 3] with their captions


@dataclasses.dataclass(frozen=True)
class Showcase:
    """Rows of images for a report.

    Attributes:
      unmasking: a row for each caption, with its images after each decoding step; masked cells are grey.
      edits: a row for each real image, with its edits.
    """

    unmasking: Sequence[Row]
    edits: Sequence[Row]


def showcase(
    model: TextToImage, sampling: Mapping[str, Any], images: np.ndarray, captions: Sequence[str], seed: int
) -> Showcase | None:
    """Draws a showcase, or returns None for a prior that is no MaskGIT.

    Args:
      model: the prior.
      sampling: the sampling parameters.
      images: real images, uint8 [C, H, W, 3].
      captions: their C captions.
      seed: of the drawn images.
    """
    if not isinstance(model.prior, MaskGITPrior):
        return None
    frames = unmasking(model, captions, seed, **sampling)
    steps = [f"step {t + 1} of {len(frames)}" for t in range(len(frames))]
    unmasked = [(caption, list(zip(steps, frames[:, i]))) for i, caption in enumerate(captions)]
    edited = [(caption, list(zip(EDITS, row))) for caption, row in edits(model, images, captions, seed, **sampling)]
    return Showcase(unmasked, edited)


def unmasking(model: TextToImage, captions: Sequence[str], seed: int, **sampling: Any) -> np.ndarray:
    """Draws an image for each caption and returns it after each decoding step: uint8 [S, C, H, W, 3].

    Masked cells are grey. The last step shows the images of `generate`.

    Args:
      model: a MaskGIT prior.
      captions: C captions.
      seed: as in `generate`.
      **sampling: the sampling parameters.
    """
    seen: dict[int, list[np.ndarray]] = {}
    on_frame = lambda frame: seen.setdefault(frame.caption, []).append(frame.images()[:, 0])
    dataclasses.replace(model, on_frame=on_frame).generate(captions, seed=seed, **sampling)
    return np.concatenate([np.stack(frames) for frames in seen.values()], axis=1)


def edits(
    model: TextToImage, images: np.ndarray, captions: Sequence[str], seed: int, **sampling: Any
) -> list[tuple[str, list[np.ndarray]]]:
    """Edits real images in four ways, see `EDITS`.

    The canvas grows by a quarter only, so that the window that is drawn still holds most of the given image. At a half
    it would begin in the middle of an object, and training images have no half objects.

    Args:
      model: a prior that can draw a token given later ones.
      images: uint8 [C, H, W, 3].
      captions: their C captions.
      seed: as in `generate`.
      **sampling: the sampling parameters.

    Returns:
      The caption of each row, and its images: the real one and its edits.
    """
    size, height = model.image_size, model.prior.layout.height
    quarter = max(1, height // 4) * size // height  # whole cells
    right = np.zeros((size, size), bool)
    right[:, size // 2 :] = True
    sampling = {"seed": seed, **sampling}
    rows = []
    for i, (image, caption) in enumerate(zip(images, captions)):
        following = captions[(i + 1) % len(captions)]
        edited = [
            model.inpaint(image, right, caption, **sampling)[0],
            model.outpaint(image, (0, 0, 0, quarter), caption, **sampling)[0],
            model.vary(image, 1 / 3, caption, **sampling)[0],
            model.inpaint(image, np.ones((size, size), bool), following, **sampling)[0],
        ]
        rows.append((caption, [image, *edited]))
    return rows
