"""Measures priors at several numbers of decoding steps: caption accuracy and time for each image.

    python experiments/step_ladder.py --workdir runs/prior-shapes runs/maskgit-shapes --output=DIR

All priors draw the same held-out captions of the embedded shapes, with the same seeds. A prior of diagonal or random
orders draws one token after another, and then groups of tokens in each number of steps. A prior of raster order only
does the first.
MaskGIT draws in each number of steps. All programs are compiled before the first measurement. Each round then times
one batch of every row in turn; the table has the fastest round, because other programs of the machine only add time.
Writes `DIR/steps.json`, and `DIR/table.md` with one row for each number of steps and two columns for each prior. The
share of captions that are right has a standard error of √(p(1 - p) / images).
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
from dalle_jax.reporting.tables import save_json
from dalle_jax.storage.files import write_file
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
    if model.prior.takes_steps:
        settings |= {f"{count} steps": {"steps": count} for count in steps}

    def draw(captions, seed, **of_row):
        return model.generate(captions, seed=seed, **sampling, **of_row)[:, 0]

    return {name: lambda *given, of_row=of_row: draw(*given, **of_row) for name, of_row in settings.items()}


def measure(rows: dict[Any, Draw], tests: TestSet, seeds: int, batch: int, rounds: int) -> dict[Any, dict[str, float]]:
    """Measures each row.

    Args:
      rows: draws images, by row.
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


def markdown(measured: dict[str, dict[str, dict[str, float]]]) -> str:
    """Formats the results of all priors as a Markdown table.

    Args:
      measured: by name of the prior, the results of `measure`.

    Returns:
      Lines. A cell is empty if a prior lacks the row.
    """
    names = list(dict.fromkeys(row for rows in measured.values() for row in rows))
    cells = lambda row: [f"{row['caption_accuracy']:.3f}", f"{row['ms_per_image']:.1f}"] if row else ["", ""]
    head = ["Steps"] + [f"{prior}: {what}" for prior in measured for what in ("captions right", "ms an image")]
    body = [[name] + [cell for rows in measured.values() for cell in cells(rows.get(name))] for name in names]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *body])


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
    names = [epath.Path(workdir).name for workdir in args.workdir]
    if len(set(names)) < len(names):
        raise DataError(f"--workdir has folders of the same name, {' and '.join(names)}. Rename one of them.")
    ladders = [ladder(model, args.steps, sampling, args.choice_temperature) for model in models]
    rows = {(name, row): draw for name, its in zip(names, ladders) for row, draw in its.items()}
    found = measure(rows, tests, args.seeds, args.batch, args.rounds)
    measured = {name: {row: found[name, row] for row in its} for name, its in zip(names, ladders)}
    settings = {key: value for key, value in vars(args).items() if key not in ("workdir", "output")}
    settings |= {"captions": len(tests.captions), "device": jax.devices()[0].device_kind}
    save_json(epath.Path(args.output) / "steps.json", {"settings": settings, "rows": measured})
    write_file(epath.Path(args.output) / "table.md", (markdown(measured) + "\n").encode())
    print(markdown(measured))


if __name__ == "__main__":
    main()
