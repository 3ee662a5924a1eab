"""Tests CLIP on single attributes of shapes: the true caption or image against one with a single change.

    python experiments/one_attribute.py --clip=runs/clip-shapes

Draws scenes whose combinations are held out of training, and changes one attribute that the caption states. "caption"
is the share of scenes where the true caption scores higher for the true image than the changed caption. "image" is the
share where the true image scores higher for the true caption than the changed image. Chance is 0.5. `order` exchanges
the places of the two objects; `binding` exchanges their colours.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from dalle_jax.data.builders.shapes_captions import drawing, scenes
from dalle_jax.data.builders.shapes_captions.scenes import Scene
from dalle_jax.reporting.tables import table
from dalle_jax.text_to_image.clip_scorer import ClipScorer

Change = Callable[[Scene], Scene]


def _of_object(index: int, **attributes: str) -> Change:
    def change(scene: Scene) -> Scene:
        objects = list(scene.objects)
        objects[index] = dataclasses.replace(objects[index], **attributes)
        return dataclasses.replace(scene, objects=tuple(objects))

    return change


def _exchange_colors(scene: Scene) -> Scene:
    first, second = scene.objects
    changed = dataclasses.replace(first, color=second.color), dataclasses.replace(second, color=first.color)
    return dataclasses.replace(scene, objects=changed)


def changes(rng: np.random.Generator, stated: Scene) -> Iterator[tuple[str, Change]]:
    """Yields one change for each attribute that a caption of two objects states, by the attribute's name."""

    def other(values, value: str) -> str:
        return str(rng.choice([each for each in values if each != value]))

    index = int(rng.integers(2))
    item = stated.objects[index]
    yield "shape", _of_object(index, shape=other(scenes.SHAPES, item.shape))
    yield "color", _of_object(index, color=other(scenes.COLORS, item.color))
    if item.size is not None:
        yield "size", _of_object(index, size=other(scenes.SIZES, item.size))
    if stated.background is not None:
        background = other(scenes.BACKGROUNDS, stated.background)
        yield "background", lambda scene: dataclasses.replace(scene, background=background)
    relation = other(scenes.RELATIONS, stated.relation)
    yield "relation", lambda scene: dataclasses.replace(scene, relation=relation)
    yield "order", lambda scene: dataclasses.replace(scene, objects=scene.objects[::-1])
    yield "binding", _exchange_colors


def measure(scorer: ClipScorer, count: int, seed: int = 0) -> dict[str, dict[str, float]]:
    """Computes the share of right choices by attribute, and over all questions.

    Args:
      scorer: a CLIP of any image size.
      count: number of scenes.
      seed: of the scenes and of the changes.

    Returns:
      Shares in [0, 1] by "caption" or "image", then by attribute.
    """
    names, drawn, captions = [], [], []  # of each question: (true, changed)
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        shown, stated = scenes.draw_scene(rng, held_out=True)
        for name, change in changes(rng, stated):
            if change(stated) == stated:
                continue
            say = lambda scene, i=i: scenes.write_caption(
                np.random.default_rng([seed, i, 1]), scene
            )  # the same phrasing
            names.append(name)
            drawn += [drawing.draw(scene, 32) for scene in (shown, change(shown))]
            captions += [say(scene) for scene in (stated, change(stated))]
    unique = list(dict.fromkeys(captions))
    places = {caption: i for i, caption in enumerate(unique)}
    text = scorer.text_features(unique)[[places[caption] for caption in captions]].reshape(len(names), 2, -1)
    images = scorer.image_features(np.stack(drawn)).reshape(len(names), 2, -1)
    true = np.sum(images[:, 0] * text[:, 0], -1)
    right = {
        "caption": true > np.sum(images[:, 0] * text[:, 1], -1),
        "image": true > np.sum(images[:, 1] * text[:, 0], -1),
    }
    kinds = list(dict.fromkeys(names))
    by_kind = {kind: np.array(names) == kind for kind in kinds}
    return {
        question: {"all": float(won.mean()), **{kind: float(won[rows].mean()) for kind, rows in by_kind.items()}}
        for question, won in right.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clip", default="runs/clip-shapes", help="a folder that ClipScorer.load reads")
    parser.add_argument("--count", type=int, default=512)
    arguments = parser.parse_args()
    print(table(measure(ClipScorer.load(arguments.clip), arguments.count)))


if __name__ == "__main__":
    main()
