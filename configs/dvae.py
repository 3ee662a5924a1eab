"""The image tokenizer: a discrete VAE trained by Gumbel-softmax relaxation (DALL-E, stage one).

    python -m dalle_jax.main --config=configs/dvae.py                  # shapes: embedded data, a laptop's CPU
    python -m dalle_jax.main --config=configs/dvae.py:emoji            # the emoji of an installed font
    python -m dalle_jax.main --config=configs/dvae.py:folder --config.data.path=DIR
    python -m dalle_jax.main --config=configs/dvae.py:coco --config.data.path=DIR   # one's own copy; see README.md
    python -m dalle_jax.main --config=configs/dvae.py:cub --config.data.path=DIR
    python -m dalle_jax.main --config=configs/dvae.py:paper --config.data.path=DIR

`paper` is the published size, its numbers those of appendix A. By the TPU compiler each chip of a v5e:8x8 needs 7.7 of
16 GiB and 111 ms a step by the roofline, 64% of the peak; of a v5p:2x4x4, 13.3 of 95 GiB, 82 ms, 74%
(configs/compile.py prints them; experiments/results/compile/compile.md).

`shapes` and `emoji` have a space-to-depth stem, and start their codes from clusters of patches
(dalle_jax/image_tokenizers/kmeans_init.py): a few thousand updates are too few for the paper's start. Their encoder
then moves slowly (`optimizer.scales`) while the decoder learns what the codes mean.

`coco` and `cub` have the paper's pictures (256 pixels), codes and 32x32 grid, at half its width and with batches of 32,
for one GPU or one TPU host: a quarter of the paper's arithmetic for each picture. 200,000 updates are 77 passes over
COCO's 82,783 training pictures, 100,000 are 534 over CUB's 5,994.

Measured: see README.md (shapes) and experiments/results/emoji/. Not yet measured: folder, coco, cub, paper.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from dalle_jax.configuration import config_files

common = config_files.module(__file__, "common.py")
schedule = common.schedule

# name: (data, model, batch, steps)
VARIANTS = {
    "shapes": (
        common.shapes(),
        {"vocab_size": 1024, "hidden": 128, "groups": 1, "blocks_per_group": 2, "codebook_dim": 128, "in_kernel": 1,
         "stem_factor": 4, "dtype": "float32"},
        32, 150,
    ),
    "emoji": (
        common.emoji(),
        {"vocab_size": 2048, "hidden": 160, "groups": 1, "blocks_per_group": 2, "codebook_dim": 160, "in_kernel": 1,
         "stem_factor": 4, "dtype": "float32"},
        32, 1000,
    ),
    "folder": (
        common.folder(128, augment="dvae"),
        {"vocab_size": 8192, "hidden": 128, "groups": 4, "blocks_per_group": 2, "codebook_dim": 128, "in_kernel": 7,
         "stem_factor": 1, "dtype": "bfloat16"},
        64, 300_000,
    ),
    "coco": (
        common.coco(augment="dvae"),
        {"vocab_size": 8192, "hidden": 128, "groups": 4, "blocks_per_group": 2, "codebook_dim": 128, "in_kernel": 7,
         "stem_factor": 1, "dtype": "bfloat16"},
        32, 200_000,
    ),
    "cub": (
        common.cub(augment="dvae"),
        {"vocab_size": 8192, "hidden": 128, "groups": 4, "blocks_per_group": 2, "codebook_dim": 128, "in_kernel": 7,
         "stem_factor": 1, "dtype": "bfloat16"},
        32, 100_000,
    ),
    "paper": (
        common.folder(256, augment="dvae"),
        {"vocab_size": 8192, "hidden": 256, "groups": 4, "blocks_per_group": 2, "codebook_dim": 128, "in_kernel": 7,
         "stem_factor": 1, "dtype": "bfloat16"},
        512, 3_000_000,
    ),
}  # fmt: skip


def get_config(variant: str | None = None) -> ConfigDict:
    variant, (data, model, batch, steps) = config_files.choose(VARIANTS, variant, __file__)
    small = variant in ("shapes", "emoji")

    config = ConfigDict()
    config.job = "train"
    config.task = "dvae"
    config.variant = variant
    config.workdir = f"runs/dvae-{variant}"
    config.seed = 0
    length = common.set_steps(config, steps)

    config.data = data
    # The least ln b of the Laplace distributions. With -1.5 the emoji's edges weigh too little beside their flat areas.
    floor = {"shapes": -1.5, "emoji": -0.5}.get(variant, placeholder(float))
    config.model = ConfigDict({**model, "logit_scale": 1.0, "codebook_scale": 1.0, "min_log_scale": floor})
    config.objective = ConfigDict({"init": "kmeans" if small else "paper", "kmeans_sharpness": 10.0})

    config.optimizer = ConfigDict({
        "b1": 0.9, "b2": 0.99 if small else 0.999, "eps": 1e-8, "weight_decay": 1e-4, "decay": "kernels",
        "clip_norm": 1.0 if small else 0.0, "accumulate_steps": 1, "scales": {"encoder": 0.02} if small else {},
    })  # fmt: skip
    if small:
        config.schedules = ConfigDict(
            {
                "learning_rate": schedule("warmup_cosine", peak=1e-2, end=1e-4, warmup_steps=50, steps=length),
                "temperature": schedule("cosine", start=0.25, end=1 / 16, steps=length // 2),
                "kl_weight": schedule("constant", value=0.05),
            }
        )
    else:
        paper = variant == "paper"  # whose schedules end before its training does
        config.schedules = ConfigDict(
            {
                "learning_rate": schedule("cosine", start=1e-4, end=1.25e-6, steps=1_200_000 if paper else length),
                "temperature": schedule("cosine", start=1.0, end=1 / 16, steps=150_000 if paper else length // 2),
                "kl_weight": schedule("cosine", start=0.0, end=6.6, steps=5000),
            }
        )
    config.ema = ConfigDict({"decay": 0.99 if small else 0.999, "every": 1})
    common.run(config, batch_size=batch, every=(length + 3) // 4 if small else 5000)
    return config
