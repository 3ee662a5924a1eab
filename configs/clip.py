"""CLIP, which says how well a picture suits a caption (arXiv 2103.00020): the reranker, and a judge.

    python -m dalle_jax.main --config=configs/clip.py                  # shapes: embedded data, a laptop's CPU
    python -m dalle_jax.main --config=configs/clip.py:emoji            # the emoji of an installed font
    python -m dalle_jax.main --config=configs/clip.py:folder --config.data.path=DIR
    python -m dalle_jax.main --config=configs/clip.py:coco --config.data.path=DIR
    python -m dalle_jax.main --config=configs/clip.py:cub --config.data.path=DIR
    python -m dalle_jax.main --config=configs/clip.py:vit_b32 --config.data.path=DIR

`shapes` leaves OpenAI's recipe in three places (README.md says what for): the image tower's positions start eight times
as large, a picture is read from all its patches, and each caption meets its own picture spoiled in a few squares beside
the batch's pictures (`dalle_jax/tasks/corrupted_negatives.py`). The others have the same options, and have them off.

`vit_b32` has the size of OpenAI's ViT-B/32 (151,277,313 parameters with a full text vocabulary) and its numbers. To use
published weights instead: `python -m dalle_jax.pretrained.clip`. `coco` and `cub` rank candidates for the paper's
evaluation sets, learned from their training splits alone (82,783 pictures seen 62 times, 5,994 seen 171 times); a
published CLIP has seen far more. The batch is compared as a whole, over all devices; `optimizer.accumulate_steps` must
stay 1. By the TPU compiler `vit_b32` needs 7.5 of 16 GiB of each chip of a v5e:16x16 and 46 ms a step by the roofline,
62% of the peak; 21.2 of 95 GiB of a v5p:4x4x4's, 77 ms, 64% (configs/compile.py prints them).

Measured: shapes and emoji, see README.md and experiments/results/. Not yet measured: folder, coco, cub, vit_b32.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from dalle_jax.configuration import config_files

common = config_files.module(__file__, "common.py")
schedule = common.schedule

# name: (data, text length, text vocabulary, patch, image (width, depth, heads), text (…), embedding, batch, steps)
# The text tower of `shapes` needs its two blocks: with one it cannot tell whose colour is whose.
VARIANTS = {
    "shapes": (common.shapes(), 20, 300, 8, (64, 1, 2), (64, 2, 2), 96, 256, 340),
    "emoji": (common.emoji(bpe_dropout=0.1), 20, 1024, 8, (128, 3, 4), (96, 2, 2), 128, 256, 200),
    "folder": (
        common.folder(128, augment="prior", bpe_dropout=0.1), 64, 8192, 16, (384, 8, 6), (384, 6, 6), 256, 512, 50_000,
    ),
    "coco": (
        common.coco(224, augment="prior", bpe_dropout=0.1), 64, 8192, 16, (384, 12, 6), (384, 6, 6), 256, 512, 10_000,
    ),
    "cub": (
        common.cub(224, augment="prior", bpe_dropout=0.1), 64, 4096, 16, (256, 8, 4), (256, 4, 4), 256, 256, 4000,
    ),
    "vit_b32": (
        common.folder(224, augment="prior"), 76, 49_407, 32, (768, 12, 12), (512, 12, 8), 512, 32_768, 390_000,
    ),
}  # fmt: skip


def get_config(variant: str | None = None) -> ConfigDict:
    variant, row = config_files.choose(VARIANTS, variant, __file__)
    data, text_length, text_vocab, patch, image, text, embed_dim, batch, steps = row
    small = variant in ("shapes", "emoji")  # sized for a CPU, where float32 is the fast type
    flat = variant == "shapes"  # pictures of flat colours in fixed places, and a short training

    config = ConfigDict()
    config.job = "train"
    config.task = "clip"
    config.variant = variant
    config.workdir = f"runs/clip-{variant}"
    config.seed = 0
    length = common.set_steps(config, steps)

    config.data = data
    config.text = ConfigDict({"vocab_size": text_vocab, "length": text_length, "path": placeholder(str)})

    config.model = ConfigDict({
        "patch": patch,
        "image_positions": 8.0 if flat else 1.0,
        "image_readout": "patches" if flat else "class_token",
        "image_width": image[0], "image_depth": image[1], "image_heads": image[2],
        "text_width": text[0], "text_depth": text[1], "text_heads": text[2],
        "embed_dim": embed_dim,
        "activation": "quick_gelu",
        "dtype": "float32" if small else "bfloat16",
    })  # fmt: skip

    # Wrong pictures beside the batch's: each one again, up to twelve of its 8 x 8 squares exchanged for another's.
    config.negatives = ConfigDict({"spoiled": 1 if flat else 0, "grid": 8, "squares": 12})

    config.optimizer = ConfigDict({
        "b1": 0.9, "b2": 0.98, "eps": 1e-6, "weight_decay": 0.2, "decay": "kernels",
        "clip_norm": 1.0 if small else 0.0, "accumulate_steps": 1,
    })  # fmt: skip
    peak = 2e-3 if flat else 3e-3 if small else 5e-4
    rate = {"end": 3e-5, "warmup_steps": 20} if small else {"end": 0.0, "warmup_steps": 2000}
    config.schedules = ConfigDict({"learning_rate": schedule("warmup_cosine", steps=length, peak=peak, **rate)})
    config.ema = ConfigDict({"decay": 0.0, "every": 1})
    common.run(config, batch_size=batch, every=(length + 3) // 4 if small else 1000)
    return config
