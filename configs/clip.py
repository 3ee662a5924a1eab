"""CLIP, which scores how well an image fits a caption (arXiv 2103.00020): the reranker, and a feature extractor.

    python -m dalle_jax.main --config=configs/clip.py                  # shapes: embedded data, a laptop's CPU
    python -m dalle_jax.main --config=configs/clip.py:small --config.data.path=DIR   # your own images, 32 pixels
    python -m dalle_jax.main --config=configs/clip.py:folder --config.data.path=DIR  # the same, 128 pixels, a GPU
    python -m dalle_jax.main --config=configs/clip.py --help           # all variants, and the keys that people set

`shapes` differs from OpenAI's recipe in three options, which the other variants have off. The image tower's positions
start eight times as large. An image is read from all its patches. Each caption also meets its own image with a few
squares exchanged, as a negative (`dalle_jax/tasks/corrupted_negatives.py`).

`vit_b32` has the size of OpenAI's ViT-B/32 (151,277,313 parameters with a full text vocabulary) and its numbers. All
weights but gains and biases decay, here and in `folder`, `coco` and `cub` (`optimizer.decay=weights`). The augmentation
of `vit_b32` is CLIP's random square crop (`data.augment=clip`). The other three see each image many times and rank
images of a prior, so they have the prior's crops. `python experiments/papers.py` compares `vit_b32` with the paper.

`python -m dalle_jax.pretrained clip` imports published weights instead. `coco` and `cub` rank candidates for the
paper's evaluation sets. They learn from the training splits alone, so they have seen far less than a published CLIP.

The loss compares the whole batch, over all devices, so `optimizer.accumulate_steps` must stay 1. The table in
experiments/results/compile/compile.md has memory and step time of `vit_b32` for each topology.

`small` and `folder` fix number of updates, text vocabulary and text length by the size of the data set (`from_data`).
To rank a prior's images, give them its text model: `--config.text.path=PRIOR/text/sentencepiece.model`.

Measured: shapes and emoji, see README.md and experiments/results/. Not yet measured: the others.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from dalle_jax.configuration import sections
from dalle_jax.configuration.config_files import choose
from dalle_jax.configuration.sections import schedule, section
from dalle_jax.configuration.size_rules import SizeRules
from dalle_jax.data.sources.source import DataOptions
from dalle_jax.models.clip import CLIPOptions
from dalle_jax.optim.optimizers import AverageOptions, OptimizerOptions
from dalle_jax.tasks.corrupted_negatives import NegativeOptions


def cpu(steps):
    """Overrides for a small model and a short training on a CPU, where float32 is the fast type."""
    return {
        "model.dtype": "float32",
        "optimizer.clip_norm": 1.0,
        "schedules.learning_rate": schedule("warmup_cosine", peak=3e-3, end=3e-5, warmup_steps=20, steps=steps),
        **sections.cadence((steps + 3) // 4),
    }


def one_gpu(steps):
    """Overrides for a training whose length follows the size of a data set."""
    return {
        "schedules.learning_rate": schedule("warmup_cosine", peak=5e-4, end=0.0, warmup_steps=steps // 20, steps=steps),
        **sections.cadence((steps + 19) // 20),
    }


# Images of flat colours in fixed places, and a short training.
FLAT = {
    "model.image_positions": 8.0,
    "model.image_readout": "patches",
    "negatives.spoiled": 1,
    "schedules.learning_rate.peak": 2e-3,
}

# The paper's: embeddings and positions decay, too. The measured variants have "kernels".
DECAY = {"optimizer.decay": "weights"}

AUGMENTED = dict(augment="prior", bpe_dropout=0.1)

VARIANTS = {
    # The text tower needs its two blocks: with one it cannot bind colours to shapes.
    "shapes": dict(
        doc="drawn shapes, embedded; two CPU cores, 1 minute",
        data=sections.SHAPES, text=dict(vocab_size=300, length=20),
        image_tower=dict(width=64, depth=1, heads=2), text_tower=dict(width=64, depth=2, heads=2),
        patch=8, embed_dim=96, batch_size=256, steps=340, overrides=[cpu, FLAT],
    ),
    "emoji": dict(
        doc="the emoji of an installed font; two CPU cores, 2 minutes",
        data=dict(sections.EMOJI, bpe_dropout=0.1), text=dict(vocab_size=1024, length=20),
        image_tower=dict(width=128, depth=3, heads=4), text_tower=dict(width=96, depth=2, heads=2),
        patch=8, embed_dim=128, batch_size=256, steps=200, overrides=[cpu],
    ),
    "small": dict(
        doc="your own images (data.path), 32 or 64 pixels; a laptop or small GPU, time by their number",
        data=dict(sections.OWN, bpe_dropout=0.1), text=dict(vocab_size=None, length=None),
        image_tower=dict(width=128, depth=3, heads=4), text_tower=dict(width=96, depth=2, heads=2),
        patch=8, embed_dim=128, batch_size=128,
        steps=None, from_data=dict(passes=15, min_steps=150, max_steps=2000), overrides=[cpu, sections.keep_best],
    ),
    "folder": dict(
        doc="your own images (data.path), 128 pixels; one GPU, not yet measured",
        data=dict(sections.FOLDER, image_size=128, **AUGMENTED), text=dict(vocab_size=None, length=None),
        image_tower=dict(width=384, depth=8, heads=6), text_tower=dict(width=384, depth=6, heads=6),
        patch=16, embed_dim=256, batch_size=512,
        steps=None, from_data=dict(sections.LARGER_TEXT, passes=60, min_steps=1000, max_steps=50_000),
        overrides=[one_gpu, DECAY],
    ),
    "coco": dict(
        doc="MS-COCO, 62 epochs of 82,783 images; one GPU or TPU host, not yet measured",
        data=dict(sections.COCO, image_size=224, **AUGMENTED), text=dict(vocab_size=8192, length=64),
        image_tower=dict(width=384, depth=12, heads=6), text_tower=dict(width=384, depth=6, heads=6),
        patch=16, embed_dim=256, batch_size=512, steps=10_000, overrides=[DECAY],
    ),
    "cub": dict(
        doc="CUB-200-2011, 171 epochs of 5,994 images; one GPU or TPU host, not yet measured",
        data=dict(sections.CUB, image_size=224, **AUGMENTED), text=dict(vocab_size=4096, length=64),
        image_tower=dict(width=256, depth=8, heads=4), text_tower=dict(width=256, depth=4, heads=4),
        patch=16, embed_dim=256, batch_size=256, steps=4000, overrides=[DECAY],
    ),
    "vit_b32": dict(
        doc="OpenAI's ViT-B/32, your own images (data.path); TPU v5e:16x16 or v5p:4x4x4, not yet measured",
        data=dict(sections.FOLDER, image_size=224, augment="clip"), text=dict(vocab_size=49_407, length=76),
        image_tower=dict(width=768, depth=12, heads=12), text_tower=dict(width=512, depth=12, heads=8),
        patch=32, embed_dim=512, batch_size=32_768, steps=390_625, overrides=[DECAY],
    ),
}  # fmt: skip

_TOWER = ("width", "depth", "heads")

KEYS = sections.TRAINING_KEYS | {
    "start_from": "workdir of another CLIP: start from its parameters and text model",
    "text.path": "file of a text model to use; a prior's scores need the prior's text model",
    "model.image_width": "width of the image tower; depth and heads are next to it",
    "model.text_width": "width of the text tower",
    "negatives.spoiled": "images with exchanged squares per image, as negatives; 0: none",
}


def get_config(variant: str | None = None) -> ConfigDict:
    variant, row = choose(VARIANTS, variant, __file__)

    config = ConfigDict()
    config.job = "train"
    config.task = "clip"
    config.variant = variant
    config.workdir = f"runs/clip-{variant}"
    config.seed = 0
    steps = sections.set_steps(config, row["steps"])
    if "from_data" in row:
        config.from_data = section(SizeRules, **row["from_data"])
    config.start_from = placeholder(str)

    config.data = section(DataOptions, **row["data"])
    config.text = sections.text(**row["text"])
    derived = ["image_size", "text_length", "text_vocab", "end_id"]  # from data and text
    towers = {f"{name}_{size}": row[f"{name}_tower"][size] for name in ("image", "text") for size in _TOWER}
    sizes = {"patch": row["patch"], "embed_dim": row["embed_dim"]}
    config.model = section(CLIPOptions, without=derived, dtype="bfloat16", **towers, **sizes)
    config.negatives = section(NegativeOptions)
    config.optimizer = section(OptimizerOptions, b2=0.98, eps=1e-6, weight_decay=0.2)
    config.schedules = ConfigDict({
        "learning_rate": schedule("warmup_cosine", peak=5e-4, end=0.0, warmup_steps=2000, steps=steps),
    })  # fmt: skip
    config.ema = section(AverageOptions)
    sections.training_loop(config, row["batch_size"], every=1000)
    sections.override(config, *row.get("overrides", []))
    return config
