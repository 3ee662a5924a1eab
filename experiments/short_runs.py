"""Runs every config for a few steps from the command line, and fails if one of them fails.

    python experiments/short_runs.py [--only NAME] [--workdir DIR]

The models of `2.8b`, `5.6b` and `paper` do not fit a small machine. Here they run with a tiny width, which tests their
data path and command line. tests/priors/test_autoregressive.py counts their parameters without creating them.

Compilation takes nearly all of the time, so programs are optimised less than usual (quick_xla.py). XLA_FLAGS in the
environment, even empty, takes precedence.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import quick_xla
import tiny_copies
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
STEPS = ["steps=2", "cadence.eval=2", "cadence.preview=2", "cadence.checkpoint=2", "eval_batches=1", "batch_size=4"]
FEW_SHAPES = ["data.builder_kwargs.num_train=512"]
SMALL_DVAE = ["model.vocab_size=32", "model.hidden=8", "model.codebook_dim=8", "model.blocks_per_group=1"]
SMALL_VQ = ["model.vocab_size=32", "model.hidden=8", "model.code_dim=8"]
SMALL_VQGAN = [
    "model.vocab_size=32",
    "model.hidden=32",
    "model.code_dim=8",
    "model.latent=8",
    "discriminator.filters=8",
]
PATCHES = [*SMALL_DVAE, "model.hidden=96", "model.codebook_dim=96"]  # k-means initialisation needs the width
SMALL_CLIP = [
    *(f"model.{tower}_{size}" for tower in ("image", "text") for size in ("width=16", "depth=1", "heads=2")),
    "text.vocab_size=300",
]
SMALL_TRUNK = [
    "model.trunk.width=16",
    "model.trunk.depth=5",
    "model.trunk.heads=2",
    "text.length=16",
    "text.vocab_size=300",
]
SMALL_BEIT = SMALL_TRUNK[:3]
SHALLOW_TRUNK = [
    *SMALL_TRUNK,
    "model.trunk.depth=3",
]  # still each kind of attention; a scan needs two more layers


def under(prefix: str, options: list[str]) -> list[str]:
    """Adds a prefix to each option."""
    return [f"{prefix}{option}" for option in options]


def make_folder(path: Path, size: int, count: int = 24) -> Path:
    """Creates a folder of small images with captions, in the layout of a user's own data."""
    path.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        colour = rng.integers(0, 255, 3)
        Image.fromarray(np.full((size, size, 3), colour, np.uint8)).save(path / f"{i}.png")
        (path / f"{i}.txt").write_text(f"a plain image number {i} of colour {colour[0]} {colour[1]} {colour[2]}\n")
    return path


def make_classes(path: Path, size: int, count: int = 12) -> Path:
    """Creates folders of small images, one for each class, in the layout of ImageNet."""
    for split in ("train", "val"):
        for shade, name in enumerate(("dark", "grey", "light")):
            (path / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = np.full((size, size, 3), 80 * shade + i, np.uint8)
                Image.fromarray(pixels).save(path / split / name / f"{i}.png")
    return path


def commands(work: Path, emoji: bool) -> list[dict[str, list[str]]]:
    """Returns chains of runs: name → config and overrides. A run may use the workdirs of earlier runs of its chain."""
    folder, big = make_folder(work / "folder", 64), make_folder(work / "big", 256)
    classes = make_classes(work / "classes", 64)
    trunk = [each for each in SHALLOW_TRUNK if each.startswith("model.")]
    vqgan = [*STEPS, *SMALL_VQGAN, "schedules.adversarial_weight.wait_steps=1"]
    shapes = {
        "dvae": ["dvae.py", *STEPS, *PATCHES, *FEW_SHAPES],
        "prior": ["prior.py", *STEPS, *SHALLOW_TRUNK, *FEW_SHAPES, f"tokenizer_from={work}/dvae"],
        "maskgit": ["maskgit.py", *STEPS, *SHALLOW_TRUNK, *FEW_SHAPES, f"tokenizer_from={work}/dvae"],
        "finetune": ["finetune.py", *STEPS, f"start_from={work}/maskgit", f"data.path={folder}", "text.path=new"],
        "finetune:lora": ["finetune.py:lora", *STEPS, f"start_from={work}/prior", f"data.path={folder}"],
        "generate:maskgit": ["generate.py", f"model_workdir={work}/maskgit", "prompts=a star", "sampling.steps=3"],
        "generate": ["generate.py", f"model_workdir={work}/prior", "prompts=a red circle|two shapes", "n=2"],
        "clip": ["clip.py", *STEPS, *SMALL_CLIP, *FEW_SHAPES],
        "evaluate": [
            "evaluate.py", f"model_workdir={work}/prior,{work}/maskgit", "count=8", "rows_at_once=4",
        ],
        "beit": ["beit.py", *STEPS, *SMALL_BEIT, *FEW_SHAPES, f"tokenizer_from={work}/dvae"],
        "vqgan": ["vqgan.py", *vqgan, *FEW_SHAPES],
        "prior:shape_classes": ["prior.py:shape_classes", *STEPS, *trunk, f"tokenizer_from={work}/dvae"],
        "maskgit:shape_classes": [
            "maskgit.py:shape_classes", *STEPS, *trunk, f"tokenizer_from={work}/dvae", "model.raster_steps=1",
        ],
        "evaluate:imagenet": [
            "evaluate.py:imagenet", f"model_workdir={work}/prior:shape_classes,{work}/maskgit:shape_classes",
            f"clip={work}/clip", "split=heldout", "count=24", "metrics.classifier=True", "rows_at_once=8",
        ],
        "prior:vqgan": ["prior.py", *STEPS, *SHALLOW_TRUNK, *FEW_SHAPES, f"tokenizer_from={work}/vqgan"],
        "generate:vqgan": ["generate.py", f"model_workdir={work}/prior:vqgan", "prompts=a red circle", "n=2"],
        "quickstart": [
            "quickstart.py", *under("prior.tokenizer.", STEPS + PATCHES + FEW_SHAPES),
            *under("prior.", STEPS + SHALLOW_TRUNK + FEW_SHAPES),
            *under("maskgit.", STEPS + SHALLOW_TRUNK + FEW_SHAPES), *under("clip.", STEPS + SMALL_CLIP + FEW_SHAPES),
            "evaluate.count=8", "evaluate.rows_at_once=4", "evaluate.metrics.candidates=2",
        ],
    }  # fmt: skip
    own_images = {
        "dvae:small": ["dvae.py:small", *STEPS, *SMALL_VQ, f"data.path={folder}"],
        "prior:small": [
            "prior.py:small", *STEPS, *SMALL_TRUNK, *under("tokenizer.", STEPS + SMALL_VQ), f"data.path={folder}",
            f"tokenizer.workdir={work}/dvae:small",
        ],
        "maskgit:small": [
            "maskgit.py:small", *STEPS, *SMALL_TRUNK, f"tokenizer_from={work}/dvae:small", f"data.path={folder}",
        ],
        "maskgit:upsample": [
            "maskgit.py:upsample", *STEPS, *SMALL_TRUNK, f"data.path={folder}", f"low_from={work}/dvae:small",
            f"tokenizer_from={work}/dvae:small", "model.encoder_depth=1",
        ],
        "generate:upsample": [
            "generate.py", f"model_workdir={work}/maskgit:small", f"upsampler={work}/maskgit:upsample",
            "prompts=a red circle", "n=2",
        ],
        "beit:small": [
            "beit.py:small", *STEPS, *SMALL_BEIT, f"tokenizer_from={work}/dvae:small", f"data.path={folder}",
        ],
        "beit:folder": [
            "beit.py:folder", *STEPS, *SMALL_BEIT, f"data.path={folder}", "data.image_size=64", "data.workers=0",
            "model.target=pixels",
        ],
        "vqgan:small": ["vqgan.py:small", *vqgan, f"data.path={folder}"],
        "vqgan:folder": [
            "vqgan.py:folder", *vqgan, f"data.path={folder}", "data.image_size=64", "data.workers=0",
        ],
        "clip:small": ["clip.py:small", *STEPS, *SMALL_CLIP, f"data.path={folder}"],
        "prior:clipgen": [
            "prior.py:clipgen", *STEPS, *trunk, f"tokenizer_from={work}/dvae:small", f"data.path={folder}",
            f"clip_from={work}/clip:small",
        ],
        "maskgit:clipgen": [
            "maskgit.py:clipgen", *STEPS, *trunk, f"tokenizer_from={work}/dvae:small", f"data.path={folder}",
            f"clip_from={work}/clip:small",
        ],
        "prior:classes": [
            "prior.py:classes", *STEPS, *trunk, f"tokenizer_from={work}/dvae:small", f"data.path={classes}",
        ],
        "maskgit:classes": [
            "maskgit.py:classes", *STEPS, *trunk, f"tokenizer_from={work}/dvae:small", f"data.path={classes}",
        ],
        "dvae:folder": [
            "dvae.py:folder", *STEPS, *SMALL_DVAE, f"data.path={folder}", "data.image_size=64", "data.workers=0",
        ],
        "prior:folder": [
            "prior.py:folder", *STEPS, *SMALL_TRUNK, f"tokenizer_from={work}/dvae:folder", f"data.path={folder}",
            "data.image_size=64", "data.workers=1",
        ],
        "clip:folder": [
            "clip.py:folder", *STEPS, *SMALL_CLIP, f"data.path={folder}", "data.image_size=64", "data.workers=0",
        ],
        "clip:vit_b32": [
            "clip.py:vit_b32", *STEPS, *SMALL_CLIP, f"data.path={folder}", "data.image_size=64", "data.workers=0",
        ],
    }  # fmt: skip
    published = {
        "dvae:paper": [
            "dvae.py:paper", *STEPS, *SMALL_DVAE, f"data.path={big}", "data.image_size=64", "data.workers=0",
        ],
    }  # fmt: skip
    for name in ("taming_f16", "gumbel_f8", "maskgit", "llamagen_f16"):
        published[f"vqgan:{name}"] = [
            f"vqgan.py:{name}", *vqgan, f"data.path={big}", "data.image_size=64", "data.workers=0",
            "objective.perceptual_weight=0", "model.blocks=1",
        ]  # fmt: skip
    published["vqgan:imagenet"] = [
        "vqgan.py:imagenet", *vqgan, f"data.path={classes}", "data.image_size=64", "data.workers=0",
        "objective.perceptual_weight=0", "model.blocks=1",
    ]  # fmt: skip
    for name in ("prior:2.8b", "prior:5.6b", "prior:paper", "maskgit:paper", "maskgit:3b"):
        published[name] = [
            name.replace(":", ".py:"), *STEPS, *SMALL_TRUNK, f"tokenizer_from={work}/dvae:paper", f"data.path={big}",
            "data.workers=0", "data.image_size=64", "ema.every=1", "mesh.data=1",
        ]  # fmt: skip
    for name in ("prior:imagenet", "maskgit:imagenet256", "maskgit:imagenet512"):
        published[name] = [
            name.replace(":", ".py:"), *STEPS, *trunk, f"tokenizer_from={work}/vqgan:maskgit", f"data.path={classes}",
            "data.workers=0", "data.image_size=64", "ema.every=1", "mesh.data=1",
        ]  # fmt: skip
    published["beit:paper"] = [
        "beit.py:paper", *STEPS, *SMALL_BEIT, f"tokenizer_from={work}/dvae:paper", f"data.path={big}", "data.workers=0",
        "data.image_size=64",
    ]  # fmt: skip
    own_images["maskgit:folder"] = ["maskgit.py:folder", *own_images["prior:folder"][1:]]
    chains = [shapes, published, own_images, on_own_copy("coco", work), on_own_copy("cub", work)]
    if emoji:
        chains.append({
            "dvae:emoji": ["dvae.py:emoji", *STEPS, *PATCHES],
            "prior:emoji": ["prior.py:emoji", *STEPS, *SHALLOW_TRUNK, f"tokenizer_from={work}/dvae:emoji"],
            "clip:emoji": ["clip.py:emoji", *STEPS, *SMALL_CLIP],
            "maskgit:emoji": ["maskgit.py:emoji", *STEPS, *SHALLOW_TRUNK, f"tokenizer_from={work}/dvae:emoji"],
        })  # fmt: skip
    return chains


def on_own_copy(name: str, work: Path) -> dict[str, list[str]]:
    """Returns the runs on a tiny copy of one of the paper's data sets, in the official layout."""
    copy = getattr(tiny_copies, name)(work / f"tiny_{name}")
    data = [f"data.path={copy}", f"data.data_dir={work}/data", "data.image_size=64", "data.workers=0"]
    prior = [*STEPS, *SMALL_TRUNK, *data, f"tokenizer_from={work}/dvae:{name}", "ema.every=1"]
    return {
        f"dvae:{name}": [f"dvae.py:{name}", *STEPS, *SMALL_DVAE, *data],
        f"prior:{name}": [f"prior.py:{name}", *prior],
        f"maskgit:{name}": [f"maskgit.py:{name}", *prior],
        f"clip:{name}": [f"clip.py:{name}", *STEPS, *SMALL_CLIP, *data],
        f"evaluate:{name}": [
            f"evaluate.py:{name}",
            f"model_workdir={work}/prior:{name}",
            f"clip={work}/clip:{name}",
            "count=4",
            *data[:2],
            "metrics.candidates=2",
            "metrics.candidate_captions=2",
            "rows_at_once=2",
        ],
    }


def run(name: str, line: list[str], work: Path) -> bool:
    """Runs a config from the command line and prints whether it succeeded.

    Returns:
      Whether it succeeded.
    """
    start, (config, *options) = time.perf_counter(), line
    command = [sys.executable, "-m", "dalle_jax.main", f"--config=configs/{config}", f"--workdir={work / name}"]
    command += under("--config.", options)
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={"XLA_FLAGS": quick_xla.flags(), **os.environ},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    ok = done.returncode == 0
    print(f"{name:14} {'ok' if ok else 'FAILED'}  {time.perf_counter() - start:.0f} s", flush=True)
    if not ok:
        print(done.stdout[-3000:], flush=True)
    return ok


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="run only this one")
    parser.add_argument("--workdir", default=None)
    arguments = parser.parse_args()
    work = Path(arguments.workdir or tempfile.mkdtemp()).resolve()

    from dalle_jax.data.builders.emoji_captions import Builder as Emoji  # to check whether its font is installed
    from dalle_jax.errors import DataError

    try:
        Emoji()
        emoji = True
    except DataError as error:
        print(f"emoji skipped: {error}")
        emoji = False
    chains = commands(work, emoji)
    if arguments.only:
        chains = [{name: chain[name] for name in chain if name == arguments.only} for chain in chains]
    # Two chains at a time, because a run spends most of its time on imports and compilation on a single core.
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        ended = pool.map(lambda chain: [run(name, line, work) for name, line in chain.items()], chains)
        results = [ok for chain in ended for ok in chain]
    print(f"{sum(results)} passed, {len(results) - sum(results)} failed")
    return 0 if results and all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
