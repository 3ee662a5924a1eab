"""Measures priors at several numbers of decoding steps: caption accuracy and time for each image.

    python experiments/step_ladder.py --workdir runs/prior-shapes runs/maskgit-shapes --output=DIR

All priors draw the same held-out captions of the embedded shapes, with the same seeds. A prior of random orders draws
one token after another, and then groups of tokens in each number of steps. A prior of raster order only does the first.
MaskGIT draws in each number of steps. All programs are compiled before the first measurement. Each round then times
one batch of every row in turn; the table has the fastest round, because other programs of the machine only add time.
Writes `DIR/steps.json` and prints the table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.errors import DataError
from dalle_jax.evaluation.test_sets import Protocol, TestSet, open_test_set
from dalle_jax.metrics import shapes
from dalle_jax.reporting.tables import save_json, table
from dalle_jax.text_to_image.text_to_image import TextToImage

Draw = Callable[[Sequence[str], int], np.ndarray]  # captions, seed: uint8 [C, H, W, 3]


def ladder(model: TextToImage, steps: Sequence[int], sampling: dict[str, Any], choice: float) -> dict[str, Draw]:
    """Returns a function that draws images for each number of steps, by name of the row.

    Args:
      model: a prior with its tokenizer.
      steps: numbers of steps.
      sampling: sampling parameters of all priors.
      choice: MaskGIT's choice_temperature.
    """
    maskgit = model.prior.name == "maskgit"
    sampling = sampling | ({"choice_temperature": choice} if maskgit else {})
    settings = {} if maskgit else {"one by one": {}}
    if maskgit or model.prior.any_order:
        settings |= {f"{count} steps": {"steps": count} for count in steps}

    def draw(captions, seed, **of_row):
        return model.generate(captions, seed=seed, **sampling, **of_row)[:, 0]

    return {name: lambda *given, of_row=of_row: draw(*given, **of_row) for name, of_row in settings.items()}


def measure(rows: dict[str, Draw], tests: TestSet, seeds: int, batch: int, rounds: int) -> dict[str, dict[str, float]]:
    """Measures each row.

    Args:
      rows: draws images, by name.
      tests: held-out captions of the shapes, with their scenes.
      seeds: images of each caption.
      batch: images in a timed call.
      rounds: timed calls of each row.

    Returns:
      By row: caption_accuracy, attribute_accuracy, and ms_per_image, the fastest of all rounds.
    """
    found = {}
    for name, draw in rows.items():
        scores = [shapes.score(draw(tests.captions, seed), tests.scenes) for seed in range(seeds)]
        found[name] = {
            key: float(np.mean([score[key] for score in scores])) for key in ("caption_accuracy", "attribute_accuracy")
        }
    captions = [tests.captions[i % len(tests.captions)] for i in range(batch)]
    for draw in rows.values():
        draw(captions, 0)  # compiles
    seconds = {name: [] for name in rows}
    for seed in range(rounds):
        for name, draw in rows.items():
            start = time.perf_counter()
            draw(captions, seed)
            seconds[name].append(time.perf_counter() - start)
    return {name: {**row, "ms_per_image": 1000 * min(seconds[name]) / batch} for name, row in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True, nargs="+", help="workdirs of trained priors of the shapes")
    parser.add_argument("--output", required=True)
    parser.add_argument("--steps", type=int, nargs="+", default=[64, 32, 16, 8])
    parser.add_argument("--count", type=int, default=512, help="captions")
    parser.add_argument("--seeds", type=int, default=2, help="images of each caption")
    parser.add_argument("--batch", type=int, default=64, help="images in a timed call")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each row")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--order", default=None, help="of all priors: random or halton; None for each prior's default")
    parser.add_argument("--weights", default=None, help="int8 for kernels of one byte per number")
    parser.add_argument("--choice_temperature", type=float, default=1.0, help="of MaskGIT")
    args = parser.parse_args()

    sampling = {"temperature": args.temperature, "order": args.order}
    models = [TextToImage.load(workdir, rows_at_once=args.batch, weights=args.weights) for workdir in args.workdir]
    data = workdirs.read_config(args.workdir[0])["data"]
    tests = open_test_set(data, Protocol("heldout", count=args.count), models[0].image_size)
    if tests.scenes is None:
        raise DataError(f"{args.workdir[0]} holds {tests.source.description}; caption accuracy needs the shapes.")
    rows = {}
    for model in models:
        name = epath.Path(model.workdir).name
        for row, draw in ladder(model, args.steps, sampling, args.choice_temperature).items():
            rows[f"{name}, {row}"] = draw
    measured = measure(rows, tests, args.seeds, args.batch, args.rounds)
    settings = {key: value for key, value in vars(args).items() if key not in ("workdir", "output")}
    settings |= {"captions": len(tests.captions), "device": jax.devices()[0].device_kind}
    save_json(epath.Path(args.output) / "steps.json", {"settings": settings, "rows": measured})
    print(table(measured))


if __name__ == "__main__":
    main()
