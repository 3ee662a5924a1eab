"""Shows how a MaskGIT prior draws: its unmasking as a strip and an animation, and edits of images as a grid.

    python experiments/unmasking.py --workdir=runs/maskgit-shapes --output=runs/unmasking

Writes three files, and `panorama.png` with `--panorama`. `strip.png` and `unmasking.gif` have one row per caption and
one column or frame per decoding step; masked cells are grey. `edits.png` has held-out images with these edits: the
right half inpainted, the canvas extended to the right, a third of the tokens drawn again, and the whole image
inpainted under the caption of another one. `panorama.png` has one row for each `--panorama`. Its first caption draws
an image. Each further caption extends it to the right by half. It describes the new half together with the half
before it:

    python experiments/unmasking.py --workdir=experiments/results/weights/shapes --output=runs/unmasking \
      --panorama="a red circle left of a blue square|a blue square left of a green cross"
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.evaluation.showcase import EDITS, edits, unmasking
from dalle_jax.evaluation.test_sets import Protocol, open_test_set
from dalle_jax.reporting.images import image_grid, resized, save_png
from dalle_jax.storage.files import write_file
from dalle_jax.text_to_image.text_to_image import TextToImage

_PANORAMA, _GAP = 960, ((0, 12), (0, 0), (0, 0))  # pixels: width, and the white below


def panorama(model: TextToImage, captions: Sequence[str], seed: int, **sampling: Any) -> np.ndarray:
    """Draws an image and extends it to the right by half for each further caption: uint8 [H, W + (C - 1)·W / 2, 3].

    Args:
      model: a MaskGIT prior.
      captions: C captions, of the first image and of each window of one image's size.
      seed: as in `generate`.
      **sampling: the sampling parameters.
    """
    size, half = model.image_size, model.image_size // 2
    canvas = model.generate(captions[0], n=1, seed=seed, **sampling)[0]
    for caption in captions[1:]:
        wider = model.outpaint(canvas[:, -size:], (0, 0, 0, half), caption, seed=seed, **sampling)[0]
        canvas = np.concatenate([canvas, wider[:, size:]], axis=1)
    return canvas


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True, help="the workdir of a trained MaskGIT prior")
    parser.add_argument("--output", required=True)
    parser.add_argument("--rows", type=int, default=6, help="number of captions")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--temperature", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--panorama", action="append", default=[], help='captions, separated by "|"')
    args = parser.parse_args()

    model = TextToImage.load(args.workdir)
    tests = open_test_set(workdirs.read_config(args.workdir)["data"], Protocol("heldout", "first", args.rows))
    images = tests.images(range(args.rows))
    out = epath.Path(args.output)
    sampling = {"steps": args.steps, "temperature": args.temperature}
    frames = unmasking(model, tests.captions, args.seed, **sampling)
    names = [f"step {t + 1}" for t in range(args.steps)]
    strip = [(caption, list(frames[:, i])) for i, caption in enumerate(tests.captions)]
    save_png(out / "strip.png", image_grid(strip, names, cell_size=96))
    sheets = [
        Image.fromarray(image_grid([(c, [f[i]]) for i, c in enumerate(tests.captions)], cell_size=96, blocks=2))
        for f in frames
    ]
    film, durations = io.BytesIO(), [300] * (len(sheets) - 1) + [1500]
    sheets[0].save(film, format="GIF", save_all=True, append_images=sheets[1:], duration=durations, loop=0)
    write_file(out / "unmasking.gif", film.getvalue())
    rows = edits(model, images, tests.captions, args.seed, **sampling)
    save_png(out / "edits.png", image_grid(rows, EDITS, cell_size=168))
    if args.panorama:
        drawn = [panorama(model, row.split("|"), args.seed, **sampling) for row in args.panorama]
        large = [np.asarray(resized(canvas, _PANORAMA)) for canvas in drawn]
        save_png(out / "panorama.png", np.concatenate([np.pad(row, _GAP, constant_values=255) for row in large]))
    print(f"Wrote strip.png, unmasking.gif{', panorama.png' * bool(args.panorama)} and edits.png to {out}")


if __name__ == "__main__":
    main()
