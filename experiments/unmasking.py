"""Shows how a MaskGIT prior draws: its unmasking as a strip and an animation, and edits of images as a grid.

    python experiments/unmasking.py --workdir=runs/maskgit-shapes --output=runs/unmasking

Writes three files. `strip.png` and `unmasking.gif` have one row per caption and one column or frame per decoding step;
masked cells are grey. `edits.png` has held-out images with these edits: the right half inpainted, the canvas extended
to the right, a third of the tokens drawn again, and the whole image inpainted under the caption of another one.
"""

from __future__ import annotations

import argparse
import io

from etils import epath
from PIL import Image

from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.evaluation.showcase import EDITS, edits, unmasking
from dalle_jax.evaluation.test_sets import Protocol, open_test_set
from dalle_jax.reporting.images import image_grid, save_png
from dalle_jax.storage.files import write_file
from dalle_jax.text_to_image.text_to_image import TextToImage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True, help="the workdir of a trained MaskGIT prior")
    parser.add_argument("--output", required=True)
    parser.add_argument("--rows", type=int, default=6, help="number of captions")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    model = TextToImage.load(args.workdir)
    tests = open_test_set(workdirs.read_config(args.workdir)["data"], Protocol("heldout", "first", args.rows))
    images = tests.images(range(args.rows))
    out = epath.Path(args.output)
    frames = unmasking(model, tests.captions, args.seed, steps=args.steps, temperature=0.5)
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
    rows = edits(model, images, tests.captions, args.seed, temperature=0.5)
    save_png(out / "edits.png", image_grid(rows, EDITS, cell_size=128))
    print(f"Wrote strip.png, unmasking.gif and edits.png to {out}")


if __name__ == "__main__":
    main()
