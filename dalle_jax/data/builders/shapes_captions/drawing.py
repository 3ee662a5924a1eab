"""Draws scenes: flat colours, edges antialiased by supersampling.

Lengths are fractions of the image's side, so a scene looks the same at every size. A large object nearly fills the
image, or its half of the image if there are two objects. Images that are mostly background would teach a small dVAE
only a handful of codes.

    H, W image size
"""

from __future__ import annotations

import functools
import math

import numpy as np

from dalle_jax.data.builders.shapes_captions.scenes import BACKGROUNDS, COLORS, Scene

# relation -> centres (x, y) of the objects in reading order
CENTERS = {None: ((0.5, 0.5),), "above": ((0.5, 0.25), (0.5, 0.75)), "left of": ((0.25, 0.5), (0.75, 0.5))}
# number of objects -> size -> half of an object's extent
EXTENTS = {1: {"large": 0.45, "small": 0.27}, 2: {"large": 0.235, "small": 0.175}}
_SAMPLES = 5  # per pixel and axis


def draw(shown: Scene, image_size: int) -> np.ndarray:
    """Draws a scene, with each object in the middle of the image or of its half of the image.

    Objects are not shifted at random, because a small prior would spend its training on shifts by fractions of a patch.

    Args:
      shown: a scene with every attribute set.
      image_size: H and W.

    Returns:
      uint8 [H, W, 3].
    """
    image = np.empty((3, image_size, image_size), np.float32)  # channels first: numpy is slow along a last axis of 3
    image[:] = np.float32(BACKGROUNDS[shown.background]).reshape(3, 1, 1)
    for item, (x, y) in zip(shown.objects, CENTERS[shown.relation]):
        extent = EXTENTS[len(shown.objects)][item.size]
        image += coverage(item.shape, x, y, extent, image_size) * (
            np.float32(COLORS[item.color]).reshape(3, 1, 1) - image
        )
    return np.rint(image).astype(np.uint8).transpose(1, 2, 0)


@functools.lru_cache(maxsize=1024)  # all scenes share a few dozen masks
def coverage(shape: str, x: float, y: float, extent: float, image_size: int) -> np.ndarray:
    """Returns the share of each pixel that a shape covers.

    Args:
      shape: one of SHAPES.
      x, y: its centre, as fractions of the image's side.
      extent: half of its width, in the same unit.
      image_size: H and W.

    Returns:
      float32 [H, W] in [0, 1], read-only.
    """
    mask = np.zeros((image_size, image_size), np.float32)
    left, top = (max(math.floor((at - extent) * image_size), 0) for at in (x, y))
    right, bottom = (min(math.ceil((at + extent) * image_size), image_size) for at in (x, y))

    def samples(first: int, last: int, at: float) -> np.ndarray:  # [samples, pixels]
        ticks = (np.arange(_SAMPLES, dtype=np.float32)[:, None] + 0.5) / _SAMPLES
        return ((np.arange(first, last, dtype=np.float32) + ticks) / image_size - at) / extent

    u, v = samples(left, right, x)[None, :, None, :], samples(top, bottom, y)[:, None, :, None]
    mask[top:bottom, left:right] = _inside(shape, u, v).mean((0, 1), dtype=np.float32)
    mask.flags.writeable = False
    return mask


def _inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Returns whether points lie inside a shape; u to the right, v downwards, both in [-1, 1] across the shape."""
    match shape:
        case "circle":
            return u * u + v * v <= 1.0
        case "square":
            return (abs(u) <= 0.9) & (abs(v) <= 0.9)
        case "triangle":
            return (abs(u) <= (v + 1.0) / 1.9) & (v <= 0.9)
        case "diamond":
            return abs(u) + abs(v) <= 1.0
        case "cross":
            return ((abs(u) <= 0.36) & (abs(v) <= 1.0)) | ((abs(v) <= 0.36) & (abs(u) <= 1.0))
    raise ValueError(f"Unknown shape {shape!r}.")
