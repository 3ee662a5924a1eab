"""The endings of image files, and those that the installed Pillow can read."""

from __future__ import annotations

import functools

import PIL.features
import PIL.Image

from dalle_jax.data.sources.decoding import is_decoded

_FEATURES = {".webp": "webp", ".avif": "avif", ".jp2": "jpg_2000"}

# Endings of raster images. Some need an optional part of Pillow, and some cannot be read.
IMAGE_ENDINGS = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jp2", ".avif", ".heic",
    ".heif",
)  # fmt: skip


def ending(name: str) -> str:
    """Returns the ending of a file's name in lower case, with its dot; "" if it has none."""
    base = name[name.rfind("/") + 1 :]
    dot = base.rfind(".")
    return base[dot:].lower() if dot > 0 else ""


@functools.cache
def readable_endings() -> tuple[str, ...]:
    """Returns the endings of the images that Pillow can read here."""
    registered = PIL.Image.registered_extensions()
    return tuple(
        each
        for each in IMAGE_ENDINGS
        if is_decoded(registered.get(each)) and (each not in _FEATURES or PIL.features.check(_FEATURES[each]))
    )
