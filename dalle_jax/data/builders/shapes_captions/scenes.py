"""Scenes of coloured shapes: their content, their captions, and the combinations that training never sees.

This is the data set's version of the zero-shot test of the DALL-E paper (Ramesh et al. 2021, section 3): every part of
a caption was seen, but not the combination. A tenth of the combinations (colour, shape, relation, colour, shape) is
held out, chosen by a checksum of the combination: `is_held_out`. Sizes, backgrounds and phrasings have no influence.

Every colour of every shape still occurs in training alone, above, below, left and right. An image token is one symbol
for a patch, so a prior cannot draw a patch that no training image holds. Such a caption would test the tokens, not the
composition.
"""

from __future__ import annotations

import dataclasses
import json
import zlib

import numpy as np

from dalle_jax.storage import json_files

SHAPES = ("circle", "square", "triangle", "diamond", "cross")
COLORS = {
    "red": (214, 36, 36),
    "green": (36, 150, 60),
    "blue": (36, 72, 220),
    "yellow": (250, 218, 40),
    "purple": (140, 36, 190),
    "orange": (248, 132, 20),
}
BACKGROUNDS = {"white": (255, 255, 255), "gray": (128, 128, 128), "black": (0, 0, 0)}
SIZES = ("small", "large")
RELATIONS = ("above", "left of")  # of the first object to the second; "below" and "right of" are phrasings
_PAIRS = tuple((color, shape) for shape in SHAPES for color in COLORS)
_INVERSE = {"above": "below", "left of": "right of"}


@dataclasses.dataclass(frozen=True)
class Object:
    """One object. None means that the caption does not state it, or that it cannot be read from the image.

    Attributes:
      color: one of COLORS.
      shape: one of SHAPES.
      size: one of SIZES.
    """

    color: str | None
    shape: str | None
    size: str | None = None


@dataclasses.dataclass(frozen=True)
class Scene:
    """The content that a caption states or an image shows.

    Attributes:
      objects: one object, or two in reading order (the upper or the left one first).
      relation: one of RELATIONS for two objects, else None.
      background: one of BACKGROUNDS, or None if the caption leaves it open.
    """

    objects: tuple[Object, ...]
    relation: str | None = None
    background: str | None = None

    def to_json(self) -> str:
        """Returns the scene as one line of JSON."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> Scene:
        """Reads the JSON of `to_json`."""
        fields = json_files.parse(text)
        try:
            objects = tuple(Object(**item) for item in fields["objects"])
            return cls(objects, fields["relation"], fields["background"])
        except (LookupError, TypeError) as error:
            raise json_files.WrongJson(f"it is no scene ({type(error).__name__}: {error})") from error


def is_held_out(scene: Scene) -> bool:
    """Returns whether training leaves out this scene's combination of colours, shapes and relation."""
    return _is_held_out([(item.color, item.shape) for item in scene.objects], scene.relation)


def _is_held_out(pairs: list[tuple[str, str]], relation: str | None) -> bool:
    if len(pairs) < 2:
        return False
    (color_1, shape_1), (color_2, shape_2) = pairs
    return zlib.crc32(f"{color_1} {shape_1} {relation} {color_2} {shape_2}".encode()) % 10 == 0


def draw_class(rng: np.random.Generator) -> tuple[Scene, Scene]:
    """Draws a scene of one object. Its colour and shape are its class; size and background vary within the class.

    Args:
      rng: the source of randomness.

    Returns:
      The scene with every attribute set, and the same with colour and shape alone.
    """
    color, shape = _PAIRS[rng.integers(len(_PAIRS))]
    shown = Scene((Object(color, shape, str(rng.choice(SIZES))),), None, str(rng.choice(list(BACKGROUNDS))))
    return shown, Scene((Object(color, shape),))


def class_name(stated: Scene) -> str:
    """Returns the name of the class of a scene from `draw_class`, such as "red circle"."""
    (item,) = stated.objects
    return f"{item.color} {item.shape}"


def draw_scene(rng: np.random.Generator, *, held_out: bool) -> tuple[Scene, Scene]:
    """Draws a random scene, and the part of it that its caption will state.

    Args:
      rng: the source of randomness.
      held_out: whether to draw a held-out combination (always of two objects). Otherwise the combination belongs to the
        training split, and a fifth of the scenes have one object.

    Returns:
      shown: the scene with every attribute set.
      stated: the same scene with None for everything that the caption leaves open. Two fifths of the captions leave the
        sizes open (objects are then large), one fifth the background.
    """
    pairs, relation = _draw_pairs(rng, held_out)
    background = str(rng.choice(list(BACKGROUNDS)))
    states_sizes, states_background = rng.random() < 0.6, rng.random() < 0.8
    sizes = ["small" if states_sizes and rng.random() < 0.4 else "large" for _ in pairs]
    shown = Scene(tuple(Object(*pair, size) for pair, size in zip(pairs, sizes)), relation, background)
    stated = Scene(
        tuple(Object(*pair, size if states_sizes else None) for pair, size in zip(pairs, sizes)),
        relation,
        background if states_background else None,
    )
    return shown, stated


def _draw_pairs(rng: np.random.Generator, held_out: bool) -> tuple[list[tuple[str, str]], str | None]:
    if not held_out and rng.random() < 0.2:
        return [_PAIRS[rng.integers(len(_PAIRS))]], None
    while True:
        pairs, relation = [_PAIRS[rng.integers(len(_PAIRS))] for _ in range(2)], str(rng.choice(RELATIONS))
        if _is_held_out(pairs, relation) == held_out:
            return pairs, relation


_ONE = ("{a} on {bg}", "on {bg}, there is {a}", "{a}, {bg}", "{bg} with {a}")
_TWO = (
    "{a} {rel} {b} on {bg}",
    "on {bg}, {a} is {rel} {b}",
    "{a} {rel} {b}, {bg}",
    "{bg} with {a} {rel} {b}",
)
_ONE_OPEN = ("{a}", "there is {a}", "a picture of {a}")
_TWO_OPEN = ("{a} {rel} {b}", "{a} is {rel} {b}", "a picture of {a} {rel} {b}")


def write_caption(rng: np.random.Generator, stated: Scene) -> str:
    """Writes a caption in a random phrasing; a quarter of the relations start from the second object.

    Args:
      rng: the source of randomness.
      stated: the scene to state; attributes that are None are left out.

    Returns:
      The caption, in lower case.
    """
    objects, relation = list(stated.objects), stated.relation
    if relation is not None and rng.random() < 0.25:
        objects, relation = objects[::-1], _INVERSE[relation]
    if relation is not None and relation.endswith("of") and rng.random() < 0.3:
        relation = "to the " + relation
    if stated.background is None:
        phrasings = _ONE_OPEN if relation is None else _TWO_OPEN
    else:
        phrasings = _ONE if relation is None else _TWO
    articles = rng.random() < 0.75
    names = [" ".join(filter(None, (item.size, item.color, item.shape))) for item in objects]
    background = f"{stated.background} background"
    if articles:
        names, background = [_with_article(name) for name in names], _with_article(background)
    return str(rng.choice(phrasings)).format(a=names[0], b=names[-1], rel=relation, bg=background)


def _with_article(name: str) -> str:
    return ("an " if name[0] in "aeiou" else "a ") + name
