"""Measures a prior that enlarges images (configs/maskgit.py:upsample) on the held-out images of its data.

    python experiments/upsampling.py --workdir=runs/maskgit-upsample --output=DIR [--clip=runs/clip] [--count=256]

Each held-out image is reduced to the smaller size, and enlarged again by the prior with its caption, by bicubic
interpolation, and by the prior without its caption. The image tokenizer's reconstruction of the large image is the best
that the prior can reach. Prints a table, and writes `DIR/upsampling.json` and `DIR/upsampling.png`. The prior invents
what the smaller image lacks. So PSNR and SSIM prefer blurred images; the Frechet distance of CLIP features does not.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
from etils import epath
from PIL import Image

from dalle_jax import ClipScorer, TextToImage
from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.configuration.options import from_config
from dalle_jax.data.augment import augment
from dalle_jax.data.sources.source import DataOptions
from dalle_jax.evaluation.test_sets import Protocol, open_test_set
from dalle_jax.metrics import frechet, image_quality
from dalle_jax.reporting.images import image_grid, save_png
from dalle_jax.reporting.tables import save_json, table

_SHOWN = 6  # rows of the grid


def enlarged(
    model: TextToImage, images: np.ndarray, captions: Sequence[str], seed: int, temperature: float
) -> dict[str, np.ndarray]:
    """Returns the images in each way, uint8 [B, H, W, 3], by name.

    Args:
      model: the prior.
      images: uint8 [B, H, W, 3] of the model's size.
      captions: B captions.
      seed, temperature: of the prior's samples.
    """
    side = model.text_model.size
    small = [augment(image, side, "none", None) for image in images]
    bicubic = [np.asarray(Image.fromarray(x).resize(images.shape[1:3], Image.Resampling.BICUBIC)) for x in small]
    nearest = [np.asarray(Image.fromarray(x).resize(images.shape[1:3], Image.Resampling.NEAREST)) for x in small]
    return {
        f"{side} pixels": np.stack(nearest),
        "bicubic": np.stack(bicubic),
        "prior": model.upsample(images, list(captions), seed, temperature=temperature),
        "prior, no caption": model.upsample(images, None, seed, temperature=temperature),
        "tokenizer": model.decode(model.encode(images)),
    }


def measured(real: np.ndarray, other: np.ndarray, scorer: ClipScorer | None) -> dict[str, float]:
    """Compares images with the real ones, both uint8 [B, H, W, 3]."""
    found = dict(image_quality.compute(image_quality.add(image_quality.empty(), real, other)))
    if scorer is not None:
        features = [scorer.image_features(images) for images in (real, other)]
        moments = [frechet.add(frechet.empty(rows.shape[1], "clip"), rows) for rows in features]
        found |= frechet.compute(*moments)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="workdir of the prior")
    parser.add_argument("--output", required=True, help="folder of the results")
    parser.add_argument("--clip", help="workdir of a CLIP, for fid_clip")
    parser.add_argument("--count", type=int, default=256, help="number of held-out images")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the samples")
    args = parser.parse_args(argv)
    model = TextToImage.load(args.workdir)
    scorer = ClipScorer.load(args.clip) if args.clip else None
    data = workdirs.read_config(args.workdir)["data"]
    split = from_config(DataOptions, data, "data").eval_split
    tests = open_test_set(data, Protocol(split, count=args.count), model.image_size)
    real = tests.images(range(len(tests.indices)))
    ways = enlarged(model, real, tests.captions, args.seed, args.temperature)
    rows = {name: measured(real, images, scorer) for name, images in ways.items()}
    print(f"{len(real)} held-out images of {tests.source.description}\n")
    print(table(rows))
    out = epath.Path(args.output)
    save_json(out / "upsampling.json", {"images": len(real), "temperature": args.temperature, **rows})
    columns = {"real": real, **ways}
    places = np.linspace(0, len(real) - 1, min(_SHOWN, len(real))).astype(int)
    shown = [(tests.captions[i], [x[i] for x in columns.values()]) for i in places]
    save_png(out / "upsampling.png", image_grid(shown, list(columns), cell_size=128))


if __name__ == "__main__":
    main()
