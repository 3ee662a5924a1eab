"""What a MaskGIT prior does, to look at: its unmasking as a strip and an animation, and edits of pictures as a grid.

    python experiments/unmasking.py --workdir=runs/maskgit-shapes --output=runs/unmasking

Writes `strip.png` and `unmasking.gif` (a caption a row, a decoding step a column; cells still masked are grey), and
`edits.png` (held-out pictures with their right half inpainted, their canvas extended to the right, and a third of
their tokens drawn anew; and inpainted whole under another picture's caption).
"""

from __future__ import annotations

import argparse

import numpy as np
from etils import epath
from PIL import Image

from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.evaluation.test_sets import Protocol, open_test_set
from dalle_jax.reporting.images import image_grid, save_png
from dalle_jax.text_to_image.editing import pixels_of
from dalle_jax.text_to_image.text_to_image import TextToImage, row_keys

GREY = 190


def trajectory(model: TextToImage, captions: list[str], seed: int, steps: int) -> np.ndarray:
    """Pictures after each decoding step, masked cells grey: uint8 [steps, C, H, W, 3]."""
    layout = model.prior.layout
    text = model.encode_text(captions)
    keys = row_keys(seed, text, np.zeros(len(captions)))
    _, tokens = model.prior.trajectory(model.params, text, keys, steps=steps, temperature=0.5)
    tokens = np.asarray(tokens)
    masked = (tokens == layout.mask_id).reshape(*tokens.shape[:2], layout.height, layout.width)
    images = model.decode(np.where(tokens == layout.mask_id, 0, tokens).reshape(-1, layout.image_length))
    grey = pixels_of(masked, model.image_size)[..., None]
    return np.where(grey, GREY, images.reshape(*tokens.shape[:2], *images.shape[1:])).astype(np.uint8)


def edits(model: TextToImage, images: np.ndarray, captions: list[str], seed: int) -> list[tuple[str, list[np.ndarray]]]:
    """Rows of a grid: the real picture and its edits."""
    size = model.image_size
    right = np.zeros((size, size), bool)
    right[:, size // 2 :] = True
    knobs = {"seed": seed, "temperature": 0.5}
    rows = []
    for i, (image, caption) in enumerate(zip(images, captions)):
        other = captions[(i + 1) % len(captions)]
        wide = model.outpaint(image, (0, 0, 0, size // 2), caption, **knobs)[0]
        square = np.full((wide.shape[1],) * 2 + (3,), 255, np.uint8)
        top = (square.shape[0] - size) // 2
        square[top : top + size] = wide
        half, varied = model.inpaint(image, right, caption, **knobs)[0], model.vary(image, 1 / 3, caption, **knobs)[0]
        swapped = model.inpaint(image, np.ones((size, size), bool), other, **knobs)[0]
        rows.append((f"{caption}; the other: {other}", [image, half, square, varied, swapped]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True, help="of a trained MaskGIT prior")
    parser.add_argument("--output", required=True)
    parser.add_argument("--rows", type=int, default=6, help="captions")
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
    save_png(out / "strip.png", image_grid(strip, names, picture_size=96))
    sheets = [
        Image.fromarray(image_grid([(c, [f[i]]) for i, c in enumerate(tests.captions)], picture_size=96, blocks=2))
        for f in frames
    ]
    with (out / "unmasking.gif").open("wb") as file:
        durations = [300] * (len(sheets) - 1) + [1500]
        sheets[0].save(file, format="GIF", save_all=True, append_images=sheets[1:], duration=durations, loop=0)
    columns = ("real", "right half inpainted", "extended to the right", "a third varied", "the other caption")
    rows = edits(model, images, tests.captions, args.seed)
    save_png(out / "edits.png", image_grid(rows, columns, picture_size=128))
    print(f"strip.png, unmasking.gif and edits.png in {out}")


if __name__ == "__main__":
    main()
