"""Compares trained image tokenizers on the held-out images of their data: PSNR, SSIM, codes used, perceptual distance.

    python experiments/compare_tokenizers.py --workdir runs/dvae-small runs/vqgan-small --output=DIR [--clip=runs/clip]

All tokenizers reconstruct the same images. Prints a table, and writes `DIR/tokenizers.json` and `DIR/tokenizers.png`:
rows of real images, each next to its reconstructions. With `--clip`, the table has the mean distance of the
reconstructions in the states of this CLIP (`dalle_jax/clip/distance.py`); lower is better.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import jax
import numpy as np
from etils import epath

from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.clip import stored
from dalle_jax.clip.distance import distance
from dalle_jax.configuration.options import from_config
from dalle_jax.data.sources.source import DataOptions
from dalle_jax.evaluation.test_sets import Protocol, open_test_set
from dalle_jax.image_tokenizers.signed_pixels import to_signed
from dalle_jax.metrics import codebook, image_quality
from dalle_jax.reporting.images import image_grid, save_png, to_uint8
from dalle_jax.reporting.tables import save_json, table

_AT_ONCE = 32  # images


def measured(workdir: str, images: np.ndarray, between: Callable | None) -> tuple[dict[str, float], np.ndarray]:
    """Measures one tokenizer.

    Args:
      workdir: of its training.
      images: uint8 [B, H, W, 3].
      between: compares two batches of pixels in [-1, 1], float32 [B]; or None.

    Returns:
      The metrics by name, and the reconstructions, uint8 [B, H, W, 3].
    """
    tokenizer, params = workdirs.load_tokenizer(workdir)
    encode, decode = (jax.jit(functools.partial(method, params)) for method in (tokenizer.encode, tokenizer.decode))
    chunks = [images[i : i + _AT_ONCE] for i in range(0, len(images), _AT_ONCE)]
    tokens = [np.asarray(encode(chunk)) for chunk in chunks]
    shown = np.concatenate([to_uint8(np.asarray(decode(some))) for some in tokens])
    counts = codebook.count(np.concatenate(tokens), tokenizer.vocab_size)
    metrics = image_quality.compute(image_quality.add(image_quality.empty(), images, shown))
    metrics |= {
        "tokens": int(np.prod(tokens[0].shape[1:])),
        "codes": tokenizer.vocab_size,
        "codes_used": int((np.asarray(counts) > 0).sum()),
        "perplexity": float(codebook.perplexity(counts)),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
    }
    if between is not None:
        pairs = zip(chunks, (shown[i : i + _AT_ONCE] for i in range(0, len(shown), _AT_ONCE)))
        found = [np.asarray(between(to_signed(real), to_signed(other))) for real, other in pairs]
        metrics["clip_distance"] = float(np.concatenate(found).mean())
    return metrics, shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True, nargs="+", help="workdirs of image tokenizers with the same data")
    parser.add_argument("--clip", help="workdir of a CLIP that was trained on the same data")
    parser.add_argument("--output", required=True)
    parser.add_argument("--shown", type=int, default=12, help="images in the grid")
    args = parser.parse_args()

    data = workdirs.read_config(args.workdir[0])["data"]
    held_out = open_test_set(data, Protocol(from_config(DataOptions, data, "data").eval_split))
    images = held_out.images(range(len(held_out.indices)))
    between = None
    if args.clip:
        clip = stored.load(args.clip)
        between = jax.jit(functools.partial(distance, clip.clip.options, clip.params["image"]))
    found = {workdir: measured(workdir, images, between) for workdir in args.workdir}

    metrics = {workdir: values for workdir, (values, _) in found.items()}
    print(f"{len(images)} held-out images of {held_out.source.description}\n")
    print(table(metrics))
    places = np.linspace(0, len(images) - 1, min(args.shown, len(images))).astype(int)
    columns = ["real", *(epath.Path(workdir).name for workdir in args.workdir)]
    grid = [("", [images[i], *(shown[i] for _, shown in found.values())]) for i in places]
    out = epath.Path(args.output)
    save_png(out / "tokenizers.png", image_grid(grid, columns, cell_size=96, blocks=2))
    save_json(out / "tokenizers.json", {"images": len(images), "data": held_out.source.description, **metrics})


if __name__ == "__main__":
    main()
