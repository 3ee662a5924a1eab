"""Reads scenes of coloured shapes back from images with fixed rules, and scores images against captions.

It needs no learned model, only numpy. An image is explained in three ways: as one object, as two objects one above the
other, and as two objects side by side. For each way, the outline of every shape and size is laid over every place where
an object can be, and its colour is fitted by least squares. The way that explains most of the difference to the
background wins, so that touching objects of one colour are separated too. Content that no outline explains is not read
as an object. A smear therefore counts as wrong, not as the shape that it resembles most.

    B images    H, W their size    S = 32 the size they are read at    P = S² pixels    K outlines    C = 3 channels
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import PIL.Image

from dalle_jax.data.builders.shapes_captions import drawing
from dalle_jax.data.builders.shapes_captions.scenes import BACKGROUNDS, COLORS, SHAPES, Object, Scene

ATTRIBUTES = ("shape", "color", "size", "relation", "background")
_NOTHING = Object(None, None)
_READ_SIZE = 32
_MIN_EXPLAINED = 0.5  # least share of an object's surroundings that its outline explains
_MIN_CONTRAST = 45.0  # least distance in RGB between an object and its background


def read_scene(image: np.ndarray) -> Scene:
    """Reads one image.

    Args:
      image: uint8 [H, W, 3], H = W, 32 or more (at 24, one image in ten is misread).

    Returns:
      The scene, with the background and every attribute of each object set. It has fewer objects, or none, if the
      image shows nothing that looks like an object.
    """
    return read_scenes(image[None])[0]


def read_scenes(images: np.ndarray, *, chunk: int = 256) -> list[Scene]:
    """Reads many images.

    Args:
      images: uint8 [B, H, W, 3], H = W.
      chunk: number of images to read at once.

    Returns:
      B scenes, as from `read_scene`.

    Raises:
      ValueError: images of another shape or type.
    """
    images = np.asarray(images)
    square = images.ndim == 4 and images.shape[1] == images.shape[2] and images.shape[3] == 3
    if images.dtype != np.uint8 or not square:
        raise ValueError(f"The images are {images.dtype} {images.shape}; expected uint8 [B, H, H, 3].")
    return [scene for start in range(0, len(images), chunk) for scene in _read(images[start : start + chunk])]


def score(images: np.ndarray, scenes: Sequence[Scene]) -> dict[str, float]:
    """Scores images against the content of their captions.

    Objects are compared in the order that fits the image better. If both are right but have changed places, only the
    relation is wrong.

    Args:
      images: uint8 [B, H, W, 3], H = W.
      scenes: B scenes; None for attributes that a caption leaves open.

    Returns:
      "caption_accuracy": share of the images with the stated number of objects and all stated attributes.
      "attribute_accuracy": share of all stated attributes that are right.
      "shape", "color", "size", "relation", "background": the same for one attribute (nan if never stated).
    """
    right: dict[str, list[bool]] = {name: [] for name in ATTRIBUTES}
    compared = _compare_all(images, scenes)
    for _, verdicts in compared:
        for name, verdict in verdicts:
            right[name].append(verdict)
    everything = [verdict for verdicts in right.values() for verdict in verdicts]
    return {
        "caption_accuracy": float(np.mean([whole for whole, _ in compared])),
        "attribute_accuracy": float(np.mean(everything)),
        **{name: float(np.mean(verdicts)) if verdicts else float("nan") for name, verdicts in right.items()},
    }


def right_captions(images: np.ndarray, scenes: Sequence[Scene]) -> np.ndarray:
    """Finds the images with the stated number of objects and all stated attributes: bool [B]. Arguments as `score`."""
    return np.array([whole for whole, _ in _compare_all(images, scenes)])


def _compare_all(images: np.ndarray, scenes: Sequence[Scene]) -> list[tuple[bool, list[tuple[str, bool]]]]:
    """Returns for each image whether all statements are true, and a verdict for every stated attribute."""
    if len(images) != len(scenes) or not scenes:
        raise ValueError(f"{len(images)} images for {len(scenes)} scenes; expected one scene per image, at least one.")
    compared = []
    for seen, stated in zip(read_scenes(images), scenes):
        verdicts = _compare(seen, stated)
        compared.append((len(seen.objects) == len(stated.objects) and all(right for _, right in verdicts), verdicts))
    return compared


def _compare(seen: Scene, stated: Scene) -> list[tuple[str, bool]]:
    """Returns one (attribute, right or not) per stated attribute."""
    found = (*seen.objects, _NOTHING, _NOTHING)[:2]
    in_place, changed_places = (
        [
            (name, getattr(shown, name) == getattr(said, name))
            for said, shown in zip(stated.objects, order)
            for name in ("shape", "color", "size")
            if getattr(said, name) is not None
        ]
        for order in (found, found[::-1])
    )
    has_changed = sum(right for _, right in changed_places) > sum(right for _, right in in_place)
    verdicts = changed_places if has_changed else in_place
    if stated.relation is not None:
        verdicts.append(("relation", seen.relation == stated.relation and not has_changed))
    if stated.background is not None:
        verdicts.append(("background", seen.background == stated.background))
    return verdicts


def _nearest(color: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
    distances = np.square(np.float32(list(palette.values())) - color).sum(-1)
    return list(palette)[int(np.argmin(distances))]


@functools.cache
def _outlines(relation: str | None, index: int) -> tuple[list[tuple[str, str]], np.ndarray]:
    """Draws every (shape, size) at every place where object `index` of a layout can be.

    Returns:
      K names, and their coverages, float32 [K, P].
    """
    center = np.array(drawing.CENTERS[relation][index]) * _READ_SIZE
    # Pixels from the centre. The drawings are centred; generated objects may be slightly off.
    reach = {None: (3, 3), "above": (4, 2), "left of": (2, 4)}[relation]
    names, masks = [], []
    for size, extent in drawing.EXTENTS[len(drawing.CENTERS[relation])].items():
        for shape in SHAPES:
            for dx in range(-reach[0], reach[0] + 1):
                for dy in range(-reach[1], reach[1] + 1):
                    x, y = (center + (dx, dy)) / _READ_SIZE
                    names.append((shape, size))
                    masks.append(drawing.coverage(shape, x, y, extent, _READ_SIZE).ravel())
    return names, np.stack(masks)


def _read(images: np.ndarray) -> list[Scene]:
    if images.shape[1] != _READ_SIZE:
        images = np.stack(
            [
                np.asarray(PIL.Image.fromarray(image).resize((_READ_SIZE, _READ_SIZE), PIL.Image.Resampling.BOX))
                for image in images
            ]
        )
    pixels = images.astype(np.float32)
    frame = np.ones((_READ_SIZE, _READ_SIZE), bool)
    frame[2:-2, 2:-2] = False
    backgrounds = np.median(pixels[:, frame], axis=1)  # [B, C]; objects cover less than half of the frame
    rest = (pixels - backgrounds[:, None, None]).reshape(len(images), -1, 3)  # [B, P, C]
    fits = {relation: _fit(rest, relation) for relation in drawing.CENTERS}
    scenes = []
    for b in range(len(images)):
        relation = max(fits, key=lambda candidate: fits[candidate][1][b])
        found = [_object(*slot, rest[b], backgrounds[b]) for slot in fits[relation][0][b]]
        objects = tuple(item for item in found if item is not None)
        background = _nearest(backgrounds[b], BACKGROUNDS)
        scenes.append(Scene(objects, relation if len(objects) == 2 else None, background))
    return scenes


def _fit(rest: np.ndarray, relation: str | None) -> tuple[list[list[tuple]], np.ndarray]:
    """Finds the best outlines of one layout.

    Args:
      rest: float32 [B, P, C], images minus their background.
      relation: of the layout.

    Returns:
      For each image, a list of (name, outline [P], share explained) per object. And the explained energy [B].
    """
    batch = len(rest)
    flat = rest.transpose(1, 0, 2).reshape(rest.shape[1], -1)  # [P, B·C]
    slots, total = [[] for _ in range(batch)], np.zeros(batch, np.float32)
    for index in range(len(drawing.CENTERS[relation])):
        names, masks = _outlines(relation, index)
        inner = (masks @ flat).reshape(len(masks), batch, 3)
        explained = np.square(inner).sum(-1) / np.square(masks).sum(1)[:, None]  # [K, B]
        best = explained.argmax(0)
        half = _half(relation, index)
        energy = np.square(rest[:, half]).sum((1, 2))
        for b in range(batch):
            share = explained[best[b], b] / max(energy[b], 1.0)
            slots[b].append((names[best[b]], masks[best[b]], share))
        total += explained[best, np.arange(batch)]
    return slots, total


def _half(relation: str | None, index: int) -> np.ndarray:
    """Marks the part of the image that belongs to object `index` of a layout: bool [P]."""
    part = np.zeros((_READ_SIZE, _READ_SIZE), bool)
    half = slice(None) if relation is None else slice(index * _READ_SIZE // 2, (index + 1) * _READ_SIZE // 2)
    if relation == "left of":
        part[:, half] = True
    else:
        part[half] = True
    return part.ravel()


def _object(
    name: tuple[str, str], outline: np.ndarray, share: float, rest: np.ndarray, background: np.ndarray
) -> Object | None:
    """Returns the object under an outline, or None."""
    color = np.median(rest[outline > 0.99], axis=0)
    if share < _MIN_EXPLAINED or np.linalg.norm(color) < _MIN_CONTRAST:
        return None
    return Object(_nearest(color + background, COLORS), *name)
