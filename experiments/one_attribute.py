"""Tests CLIP on single attributes of shapes: the true caption or image against one with a single change.

    python experiments/one_attribute.py --clip=runs/clip-shapes

Draws scenes whose combinations are held out of training, and changes one attribute that the caption states. "caption"
is the share of scenes where the true caption scores higher for the true image than the changed caption. "image" is the
share where the true image scores higher for the true caption than the changed image. Chance is 0.5. `order` exchanges
the places of the two objects; `binding` exchanges their colours.

With `--model=RUN`, it also tests CLIP on the images that matter to the best of N: candidates that this prior drew. For
each kind of exchange it counts the candidates whose two objects have exchanged colours or shapes. `prefers_right` is
the share of pairs, a right candidate and an exchanged one of the same caption, where the right one scores higher.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.data.builders.shapes_captions import drawing, scenes
from dalle_jax.data.builders.shapes_captions.scenes import Scene
from dalle_jax.evaluation.test_sets import Protocol, open_test_set
from dalle_jax.metrics import shapes as metrics_of_shapes
from dalle_jax.reporting.tables import table
from dalle_jax.text_to_image.clip_scorer import ClipScorer
from dalle_jax.text_to_image.text_to_image import TextToImage

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


def exchange(scene: Scene, attribute: str) -> Scene:
    """Exchanges an attribute of the two objects of a scene."""
    first, second = scene.objects
    values = getattr(second, attribute), getattr(first, attribute)
    objects = [dataclasses.replace(each, **{attribute: value}) for each, value in zip((first, second), values)]
    return dataclasses.replace(scene, objects=tuple(objects))


def measure_candidates(
    images: np.ndarray, scores: np.ndarray, stated: Sequence[Scene]
) -> dict[str, dict[str, float | int]]:
    """Counts candidates that exchange an attribute of the two objects, and compares their scores with right ones.

    Args:
      images: candidates of C captions, uint8 [C, N, H, W, 3].
      scores: CLIP's scores for their captions, float32 [C, N].
      stated: what the captions state, C scenes. Those of one object count as captions only.

    Returns:
      By "color" or "shape": "candidates", "exchanged", the number of "captions_with_both" kinds, the number of captions
      whose best candidate is exchanged ("best_is_exchanged"), and the share "prefers_right", nan without a pair.
    """
    n, found = images.shape[1], {}
    for attribute in ("color", "shape"):
        exchanged, best, shares = 0, 0, []
        for shown, values, scene in zip(images, scores, stated):
            if len(scene.objects) != 2 or (other := exchange(scene, attribute)) == scene:
                continue
            right, wrong = (metrics_of_shapes.right_captions(shown, [one] * n) for one in (scene, other))
            exchanged, best = exchanged + int(wrong.sum()), best + int(wrong[np.argmax(values)])
            if right.any() and wrong.any():
                shares.append(np.mean(values[right][:, None] > values[wrong]))
        found[attribute] = {
            "candidates": n * len(images), "exchanged": exchanged, "captions_with_both": len(shares),
            "best_is_exchanged": best, "prefers_right": float(np.mean(shares)) if shares else float("nan"),
        }  # fmt: skip
    return found


def candidates(workdir: str, scorer: ClipScorer, captions: int, count: int) -> dict[str, dict[str, float | int]]:
    """Draws `count` candidates for each of `captions` held-out captions and measures them."""
    model = TextToImage.load(workdir, clip=None)
    test_set = open_test_set(workdirs.read_config(workdir)["data"], Protocol("heldout", count=captions))
    images = model.generate(test_set.captions, n=count, seed=0)
    scores = np.stack([scorer.score(shown, caption) for shown, caption in zip(images, test_set.captions)])
    return measure_candidates(images, scores, test_set.scenes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clip", default="runs/clip-shapes", help="a folder that ClipScorer.load reads")
    parser.add_argument("--count", type=int, default=512, help="scenes of real images")
    parser.add_argument("--model", help="workdir of a prior of shapes, whose candidates are scored too")
    parser.add_argument("--captions", type=int, default=256)
    parser.add_argument("--candidates", type=int, default=16, help="candidates of each caption")
    arguments = parser.parse_args()
    scorer = ClipScorer.load(arguments.clip)
    print(table(measure(scorer, arguments.count)))
    if arguments.model:
        print(table(candidates(arguments.model, scorer, arguments.captions, arguments.candidates)))


if __name__ == "__main__":
    main()
