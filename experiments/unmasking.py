"""Shows how a MaskGIT prior draws: its unmasking as a strip and an animation, and edits of images as a grid.

    python experiments/unmasking.py --workdir=runs/maskgit-shapes --output=runs/unmasking

Writes three files. `strip.png` and `unmasking.gif` have one row per caption and one column or frame per decoding step;
masked cells are grey. `edits.png` has held-out images with these edits: the right half inpainted, the canvas extended
to the right, a third of the tokens drawn again, and the whole image inpainted under the caption of another one.
"""

from __future__ import annotations

import argparse
import dataclasses
import io

import numpy as np
from etils import epath
from PIL import Image

from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.evaluation.test_sets import Protocol, open_test_set
from dalle_jax.reporting.images import image_grid, save_png
from dalle_jax.storage.files import write_file
from dalle_jax.text_to_image.text_to_image import TextToImage


def trajectory(model: TextToImage, captions: list[str], seed: int, steps: int) -> np.ndarray:
    """Draws images after each decoding step, masked cells grey: uint8 [steps, C, H, W, 3]."""
    seen: dict[int, list[np.ndarray]] = {}
    on_frame = lambda frame: seen.setdefault(frame.caption, []).append(frame.images()[:, 0])
    dataclasses.replace(model, on_frame=on_frame).generate(captions, seed=seed, steps=steps, temperature=0.5)
    return np.concatenate([np.stack(frames) for frames in seen.values()], axis=1)


def edits(model: TextToImage, images: np.ndarray, captions: list[str], seed: int) -> list[tuple[str, list[np.ndarray]]]:
    """Returns rows of a grid: the real image and its edits."""
    size = model.image_size
    right = np.zeros((size, size), bool)
    right[:, size // 2 :] = True
    sampling = {"seed": seed, "temperature": 0.5}
    rows = []
    for i, (image, caption) in enumerate(zip(images, captions)):
        other = captions[(i + 1) % len(captions)]
        wide = model.outpaint(image, (0, 0, 0, size // 2), caption, **sampling)[0]
        square = np.full((wide.shape[1],) * 2 + (3,), 255, np.uint8)
        top = (square.shape[0] - size) // 2
        square[top : top + size] = wide
        half, varied = (
            model.inpaint(image, right, caption, **sampling)[0],
            model.vary(image, 1 / 3, caption, **sampling)[0],
        )
        swapped = model.inpaint(image, np.ones((size, size), bool), other, **sampling)[0]
        rows.append((f"{caption}; the other: {other}", [image, half, square, varied, swapped]))
    return rows


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
    frames = trajectory(model, tests.captions, args.seed, args.steps)
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
    columns = ("real", "right half inpainted", "extended to the right", "a third varied", "the other caption")
    rows = edits(model, images, tests.captions, args.seed)
    save_png(out / "edits.png", image_grid(rows, columns, cell_size=128))
    print(f"Wrote strip.png, unmasking.gif and edits.png to {out}")


if __name__ == "__main__":
    main()
