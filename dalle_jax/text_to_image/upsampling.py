"""Enlarges images with a prior of the condition `LowResolution` (Muse, arXiv 2301.00704, section 2.5).

B images    H, W size of the model's images
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from dalle_jax.errors import ConfigError, DataError
from dalle_jax.priors.low_resolution import LowResolution
from dalle_jax.text_to_image import drawing, inputs
from dalle_jax.text_to_image.sampling_parameters import parse


class Model(drawing.Drawer, Protocol):
    """The part of `TextToImage` that enlarging uses. Its attributes have the same meaning here."""

    text_model: Any
    image_size: int
    workdir: str
    fit: str


def check_draws_captions(model: Model) -> None:
    """Raises a `ConfigError` if a model enlarges images, and draws none from captions."""
    if not model.prior.layout.condition.reads_requests:
        raise ConfigError(
            f"{model.workdir} enlarges images, and draws none from captions. Give the workdir of another prior. "
            "`python experiments/upsampling.py` measures a prior that enlarges images, and --config.upsampler=DIR of "
            "configs/generate.py draws with one."
        )


def upsample(
    model: Model, images: Any, captions: str | Sequence[str] | None, seed: int, sampling: dict[str, Any]
) -> np.ndarray:
    """Implements `TextToImage.upsample`, which explains arguments and errors."""
    condition = model.prior.layout.condition
    if not isinstance(condition, LowResolution):
        raise ConfigError(
            f"upsample needs a prior that was trained to enlarge images (configs/maskgit.py:upsample). "
            f"{model.workdir or 'This model'} draws images given {condition!r}."
        )
    _, seed = drawing.check_count(1, seed)
    options, negative = parse(sampling)
    if negative is not None:
        raise ConfigError("upsample has no negative caption. Leave it out.")
    model.prior.check_sampling(options)
    small = inputs.images(images, model.text_model.size, model.fit)
    rows = condition.of_images(small, model.text_model)
    if captions is not None:
        words = inputs.captions(captions)
        words = words * len(rows) if isinstance(captions, str) else words
        if len(words) != len(rows):
            raise DataError(f"{len(words)} captions were given for {len(rows)} images; expected one for each, or one.")
        rows = condition.with_captions(rows, words, model.text_model)
    drawn = np.empty((len(rows), model.image_size, model.image_size, 3), np.uint8)
    for part in drawing.chunks(model, len(rows), 1):
        drawn[part.caption : part.caption + part.captions] = drawing.draw(model, rows, part, seed, options, None)[:, 0]
    return drawn
