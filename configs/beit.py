"""BEiT: an image model that learns by filling in masked patches (arXiv 2106.08254), and its fine-tuning to classes.

    python -m dalle_jax.main --config=configs/beit.py                  # shapes: embedded data, a laptop's CPU
    python -m dalle_jax.main --config=configs/beit.py:small --config.data.path=DIR   # your own images, no captions
    python -m dalle_jax.main --config=configs/beit.py:small --config.data.path=CLASSES --config.model.target=labels \\
      --config.start_from=runs/beit-small --workdir=runs/labels        # fine-tune it to class folders
    python experiments/linear_probe.py --workdir runs/beit-shapes --output=DIR    # see what its layers know

The targets of masked patches are their tokens, from an image tokenizer that is trained first if needed. It reads the
image at the size at which one token stands for one patch: half of it in `small`, `folder` and `paper`, all of it in
`shapes`. Other targets are one line each and need no tokenizer:

    SimMIM    --config.model.target=pixels --config.model.masks=random --config.model.masked_share=0.6
    MAE       --config.model.target=normalized_pixels --config.model.masks=random --config.model.masked_share=0.75

MAE's encoder leaves masked patches out; this one sees them as masked (dalle_jax/models/beit.py). CLASSES has a folder
for each class, perhaps inside `train` and `val`. Without `start_from` the target "labels" trains from scratch.

`paper` has BEiT-B's size and numbers: 800 epochs over ImageNet's 1,281,167 images. Its dVAE is the one of
configs/dvae.py at 112 pixels, because DALL-E's own may be given as --config.tokenizer_from=DIR
(`python -m dalle_jax.pretrained openai_dvae`).

Measured: shapes, and a smaller `small` on clip art, see experiments/results/probes/README.md. Not yet measured: the
others.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import dvae
from dalle_jax.configuration import sections
from dalle_jax.configuration.config_files import choose
from dalle_jax.configuration.sections import schedule, section
from dalle_jax.configuration.size_rules import SizeRules
from dalle_jax.data.sources.source import DataOptions
from dalle_jax.models.beit import BEiTOptions
from dalle_jax.models.transformer_options import TransformerOptions
from dalle_jax.optim.optimizers import AverageOptions, OptimizerOptions


def cpu(steps):
    """Overrides for a small model and a short training on a CPU, where float32 is the fast type."""
    return {
        "model.trunk.norm": "rmsnorm",
        "model.trunk.norm_epsilon": 0.0,
        "model.trunk.activation": "gelu_tanh",
        "model.trunk.qkv_bias": False,
        "model.trunk.qk_norm": True,
        "model.trunk.dtype": "float32",
        "model.trunk.layer_scale": 0.0,
        "model.trunk.drop_path": 0.0,
        "model.trunk.scan": False,
        "optimizer.clip_norm": 1.0,
        "schedules.learning_rate": schedule(
            "warmup_cosine", peak=2e-3, end=1e-5, warmup_steps=steps // 20, steps=steps
        ),
        **sections.cadence((steps + 3) // 4),
    }


def one_gpu(steps):
    """Overrides for a training whose length follows the size of a data set."""
    return {
        "schedules.learning_rate": schedule(
            "warmup_cosine", peak=1e-3, end=1e-5, warmup_steps=steps // 20, steps=steps
        ),
        **sections.cadence((steps + 19) // 20),
    }


VARIANTS = {
    "shapes": dict(
        doc="drawn shapes, embedded; one CPU core, 2 minutes",
        tokenizer="shapes", data=sections.SHAPES, pixels_per_token_pixel=1,
        trunk=dict(width=96, depth=4, heads=4), patch=4, smallest_block=4,
        batch_size=16, steps=750, overrides=[cpu],
    ),
    "small": dict(
        doc="your own images (data.path), 64 pixels, no captions; a laptop or small GPU, time by their number",
        tokenizer="small", data=dict(sections.OWN, image_size=64), pixels_per_token_pixel=2,
        trunk=dict(width=192, depth=6, heads=6), patch=8, smallest_block=4,
        batch_size=32, steps=None, from_data=dict(passes=40, min_steps=1000, max_steps=20_000),
        overrides=[cpu, sections.keep_best],
    ),
    "folder": dict(
        doc="your own images (data.path), 128 pixels, no captions; one GPU, not yet measured",
        tokenizer="folder", data=dict(sections.FOLDER, image_size=128, augment="dvae"), pixels_per_token_pixel=2,
        trunk=dict(width=512, depth=12, heads=8), patch=16, smallest_block=4,
        batch_size=256, steps=None, from_data=dict(passes=120, min_steps=5000, max_steps=100_000), overrides=[one_gpu],
    ),
    "paper": dict(
        doc="BEiT-B, your own images (data.path), 224 pixels; TPU v5e:8x8 or v5p:2x4x4, not yet measured",
        tokenizer="paper", data=dict(sections.FOLDER, image_size=224, augment="dvae"), pixels_per_token_pixel=2,
        trunk=dict(width=768, depth=12, heads=12), patch=16, smallest_block=16, batch_size=2048, steps=500_455,
    ),
}  # fmt: skip

KEYS = sections.TRAINING_KEYS | {
    "tokenizer_from": "directory of a trained or imported image tokenizer to use instead of training one",
    "start_from": "workdir of another BEiT: start from its trunk",
    "model.target": "tokens; pixels (SimMIM), normalized_pixels (MAE); or labels, the names of class folders",
    "model.masks": "blocks (BEiT) or random (SimMIM, MAE)",
    "model.masked_share": "share of masked patches",
    "model.patch": "side of a patch in pixels",
    "model.trunk.width": "width of the transformer; depth and heads are next to it",
}


def get_config(variant: str | None = None) -> ConfigDict:
    variant, row = choose(VARIANTS, variant, __file__)

    config = ConfigDict()
    config.job = "train"
    config.task = "beit"
    config.variant = variant
    config.workdir = f"runs/beit-{variant}"
    config.seed = 0
    steps = sections.set_steps(config, row["steps"])
    if "from_data" in row:
        config.from_data = section(SizeRules, without=["max_vocab_size", "max_text_length"], **row["from_data"])
    config.tokenizer = dvae.get_config(row["tokenizer"])
    sections.share_minutes(config, "tokenizer")
    config.tokenizer_from = placeholder(str)
    config.tokenizer_step = placeholder(int)
    config.start_from = placeholder(str)

    config.data = section(DataOptions, **row["data"])
    sections.follow_data(config.tokenizer, config.data)
    del config.tokenizer.data["image_size"]
    config.tokenizer.data.image_size = config.data.get_oneway_ref("image_size") // row["pixels_per_token_pixel"]
    trunk = section(
        TransformerOptions, positions="relative", layer_scale=0.1, drop_path=0.1, qkv_bias=True, norm_epsilon=1e-6,
        **row["trunk"],
    )  # fmt: skip
    config.model = section(BEiTOptions, trunk=trunk, patch=row["patch"], smallest_block=row["smallest_block"])
    config.optimizer = section(OptimizerOptions, b2=0.98, weight_decay=0.05, clip_norm=3.0)
    config.schedules = ConfigDict({
        "learning_rate": schedule("warmup_cosine", peak=1.5e-3, end=1e-5, warmup_steps=6255, steps=steps),
    })  # fmt: skip
    config.ema = section(AverageOptions)
    sections.training_loop(config, row["batch_size"], every=5000)
    sections.override(config, *row.get("overrides", []))
    return config
