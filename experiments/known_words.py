"""Draws held-out captions whose every word was seen in training, each as the best of N by CLIP.

    python experiments/known_words.py --workdir=runs/prior-small --clip=runs/clip-small --output=DIR

Training has seen the words of these captions, but neither the captions' images nor, in most cases, the words together.
A reader checks the grid: does the image show what the caption says? Writes `DIR/known_words.png` (the real image, its
reconstruction from tokens, and the best images) and `DIR/known_words.json` (captions, scores and settings).
"""

from __future__ import annotations

import argparse
import collections
import re
from collections.abc import Iterable

import numpy as np
from etils import epath

from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.configuration.options import from_config
from dalle_jax.data.sources.open import open_source
from dalle_jax.data.sources.source import DataOptions
from dalle_jax.data.text import normalize
from dalle_jax.errors import DataError
from dalle_jax.evaluation.test_sets import Protocol, TestSet, open_test_set
from dalle_jax.reporting.images import image_grid, save_png
from dalle_jax.reporting.tables import save_json
from dalle_jax.text_to_image.text_to_image import TextToImage


def words(caption: str) -> tuple[str, ...]:
    """Returns the words of a caption in normal form, without punctuation."""
    return tuple(re.findall(r"\w+", normalize(caption)))


def choose(held_out: TestSet, training: Iterable[str], count: int, min_count: int = 1) -> list[int]:
    """Chooses captions that training has not seen, but whose every word it has. Images of a single colour show nothing.

    Args:
      held_out: the held-out split, with the first caption of each image.
      training: captions of the training split.
      count: the number of captions to choose, spread evenly over the split.
      min_count: the number of training captions that each word must occur in.

    Returns:
      Ascending places in `held_out.captions`. Captions that are equal count once.

    Raises:
      DataError: no caption qualifies.
    """
    seen, uses = set(), collections.Counter()
    for caption in training:
        seen.add(words(caption))
        uses.update(set(words(caption)))
    known = {word for word, found in uses.items() if found >= min_count}
    chosen = {}
    for place, caption in enumerate(held_out.captions):
        found = words(caption)
        if found and known.issuperset(found) and found not in seen:
            chosen.setdefault(found, place)
    if not chosen:
        raise DataError(
            f"{held_out.source.description}: no new caption consists of words that {min_count} captions of the "
            "training split have."
        )
    places = [place for place in chosen.values() if _shows_something(held_out, place)]
    return [places[i] for i in np.unique(np.linspace(0, len(places) - 1, min(count, len(places))).astype(int))]


def _shows_something(held_out: TestSet, place: int) -> bool:
    image = held_out.images([int(held_out.owners[place])])[0]
    return bool((image != image[0, 0]).any())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True, help="workdir of a trained prior")
    parser.add_argument("--clip", required=True, help="workdir of a CLIP that was trained on the same data")
    parser.add_argument("--output", required=True)
    parser.add_argument("--captions", type=int, default=24)
    parser.add_argument("--min_count", type=int, default=1, help="training captions that each word must occur in")
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--shown", type=int, default=4, help="images of each caption in the grid, best first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top_p", type=float, default=None)
    parser.add_argument("--guidance", type=float, default=0.0)
    args = parser.parse_args()

    data = workdirs.read_config(args.workdir)["data"]
    options = from_config(DataOptions, data, "data")
    held_out = open_test_set(data, Protocol(options.eval_split))
    places = choose(held_out, open_source(options, options.train_split).captions(), args.captions, args.min_count)
    captions = [held_out.captions[place] for place in places]
    real = held_out.images([int(held_out.owners[place]) for place in places])

    model = TextToImage.load(args.workdir, clip=args.clip)
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "guidance": args.guidance}
    best = model.best_of(captions, args.candidates, args.shown, args.seed, **sampling)
    reconstructed = model.decode(model.encode(real))
    columns = ("real", "reconstructed", *[f"best of {args.candidates}"] * args.shown)
    rows = [(caption, [real[i], reconstructed[i], *best.images[i]]) for i, caption in enumerate(captions)]
    out = epath.Path(args.output)
    save_png(out / "known_words.png", image_grid(rows, columns, cell_size=96, blocks=2))
    settings = {
        "workdir": args.workdir,
        "step": model.step,
        "min_count": args.min_count,
        "candidates": args.candidates,
        "seed": args.seed,
        **sampling,
    }
    scores = {caption: [round(float(score), 3) for score in best.scores[i]] for i, caption in enumerate(captions)}
    save_json(out / "known_words.json", {"settings": settings, "clip_scores": scores})
    print(f"Wrote known_words.png and known_words.json with {len(captions)} captions to {out}")


if __name__ == "__main__":
    main()
