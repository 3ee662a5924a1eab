"""The image tokenizer: a discrete VAE trained by Gumbel-softmax relaxation (DALL-E, stage one).

    python -m dalle_jax.main --config=configs/dvae.py                  # shapes: embedded data, a laptop's CPU
    python -m dalle_jax.main --config=configs/dvae.py:small --config.data.path=DIR   # your own images, 32 pixels
    python -m dalle_jax.main --config=configs/dvae.py:folder --config.data.path=DIR  # the same, 128 pixels, a GPU
    python -m dalle_jax.main --config=configs/dvae.py --help           # all variants, and the keys that people set

`paper` has the published size and the numbers of appendix A. `coco` and `cub` have the paper's 256 pixels, codes and
32x32 grid, at half its width: a quarter of its arithmetic per image. `shapes` and `emoji` have a space-to-depth stem.
Their codes start from clusters of patches (dalle_jax/image_tokenizers/kmeans_init.py), because a few thousand updates
are too few for the paper's start. Their encoder then moves slowly while the decoder learns the codes.

`small` is not the paper's. It is a vector-quantised tokenizer (dalle_jax/image_tokenizers/vq_network.py, task "vq"),
whose codes are running averages and whose training decodes tokens, because the relaxation makes little progress in a
few thousand updates. Its grid has model.tokens_per_side=8 rows at any data.image_size that 8 divides.

`small` and `folder` fix their number of updates by the size of the data set (`from_data`), once, at the beginning.
`--config.steps=N` sets it instead.

Measured: shapes and emoji, see README.md and experiments/results/. `small` on Debian's openclipart-png, two CPU cores:
22.9 dB on held-out images after 1,000 updates and 142 s. Not yet measured: the others.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from dalle_jax.configuration import sections
from dalle_jax.configuration.config_files import choose
from dalle_jax.configuration.sections import schedule, section
from dalle_jax.configuration.size_rules import SizeRules
from dalle_jax.data.sources.source import DataOptions
from dalle_jax.image_tokenizers.dvae import DVAEOptions
from dalle_jax.image_tokenizers.vq_network import VQOptions
from dalle_jax.optim.optimizers import AverageOptions, OptimizerOptions
from dalle_jax.tasks.dvae import ObjectiveOptions
from dalle_jax.tasks.vq import VQObjectiveOptions

SMALL_MODEL = dict(groups=1, in_kernel=1, stem_factor=4)  # no convolution at full resolution
HALF_WIDTH = dict(hidden=128, dtype="bfloat16")


def cpu(steps):
    """Overrides for a small model and a short training on a CPU, where float32 is the fast type."""
    return {
        "objective.init": "kmeans",
        "optimizer.b2": 0.99,
        "optimizer.clip_norm": 1.0,
        "optimizer.scales": {"encoder": 0.02},
        "schedules.learning_rate": schedule("warmup_cosine", peak=1e-2, end=1e-4, warmup_steps=50, steps=steps),
        "schedules.temperature": schedule("cosine", start=0.25, end=1 / 16, steps=steps // 2),
        "schedules.kl_weight": schedule("constant", value=0.05),
        "ema.decay": 0.99,
        **sections.cadence((steps + 3) // 4),
    }


def quantized(steps):
    """Overrides for the vector-quantised tokenizer and a short training on a CPU."""
    return {
        "optimizer.b2": 0.99,
        "optimizer.clip_norm": 1.0,
        "schedules": {"learning_rate": schedule("warmup_cosine", peak=2e-3, end=4e-5, warmup_steps=50, steps=steps)},
        "ema.decay": 0.99,
        **sections.cadence((steps + 3) // 4),
    }


def one_gpu(steps):
    """Overrides for a training whose length follows the size of a data set."""
    return {
        "schedules.kl_weight": schedule("cosine", start=0.0, end=6.6, steps=steps // 10),
        **sections.cadence((steps + 19) // 20),
    }


# The paper's schedules end before its training does.
PAPER = {"schedules.learning_rate.steps": 1_200_000, "schedules.temperature.steps": 150_000}

VARIANTS = {
    "shapes": dict(
        doc="drawn shapes, embedded; two CPU cores, 1 minute",
        data=sections.SHAPES,
        model=dict(vocab_size=1024, hidden=128, codebook_dim=128, min_log_scale=-1.5, **SMALL_MODEL),
        batch_size=32, steps=150, overrides=[cpu],
    ),
    # With min_log_scale=-1.5 the emoji's edges would weigh too little next to their flat areas.
    "emoji": dict(
        doc="the emoji of an installed font; two CPU cores, 4 minutes",
        data=sections.EMOJI,
        model=dict(vocab_size=2048, hidden=160, codebook_dim=160, min_log_scale=-0.5, **SMALL_MODEL),
        batch_size=32, steps=1000, overrides=[cpu],
    ),
    "small": dict(
        doc="your own images (data.path), 32 or 64 pixels; a laptop or small GPU, time by their number",
        data=sections.OWN,
        task="vq", model=dict(vocab_size=2048), batch_size=32,
        steps=None, from_data=dict(passes=10, min_steps=1000, max_steps=4000),
        overrides=[quantized, sections.keep_best],
    ),
    "folder": dict(
        doc="your own images (data.path), 128 pixels; one GPU, not yet measured",
        data=dict(sections.FOLDER, image_size=128, augment="dvae"), model=HALF_WIDTH,
        batch_size=64, steps=None, from_data=dict(passes=60, min_steps=5000, max_steps=60_000), overrides=[one_gpu],
    ),
    "coco": dict(
        doc="MS-COCO, 77 epochs of 82,783 images; one GPU or TPU host, not yet measured",
        data=dict(sections.COCO, augment="dvae"), model=HALF_WIDTH, batch_size=32, steps=200_000,
    ),
    "cub": dict(
        doc="CUB-200-2011, 534 epochs of 5,994 images; one GPU or TPU host, not yet measured",
        data=dict(sections.CUB, augment="dvae"), model=HALF_WIDTH, batch_size=32, steps=100_000,
    ),
    "paper": dict(
        doc="the paper's size, your own images (data.path), 256 pixels; TPU v5e:8x8 or v5p:2x4x4, not yet measured",
        data=dict(sections.FOLDER, image_size=256, augment="dvae"), model=dict(dtype="bfloat16"),
        batch_size=512, steps=3_000_000, overrides=[PAPER],
    ),
}  # fmt: skip

# config.task → the options of `model` and `objective`
OPTIONS = {"dvae": (DVAEOptions, ObjectiveOptions), "vq": (VQOptions, VQObjectiveOptions)}

KEYS = sections.TRAINING_KEYS | {
    "start_from": "workdir of another image tokenizer: start from its parameters",
    "model.vocab_size": "number of codes",
    "model.hidden": "width of the first group of blocks",
    "schedules.learning_rate.end": "step size at the end",
}


def get_config(variant: str | None = None) -> ConfigDict:
    variant, row = choose(VARIANTS, variant, __file__)

    config = ConfigDict()
    config.job = "train"
    config.task = row.get("task", "dvae")
    config.variant = variant
    config.workdir = f"runs/dvae-{variant}"
    config.seed = 0
    steps = sections.set_steps(config, row["steps"])
    if "from_data" in row:
        config.from_data = section(SizeRules, without=["max_vocab_size", "max_text_length"], **row["from_data"])
    config.start_from = placeholder(str)

    config.data = section(DataOptions, **row["data"])
    model, objective = OPTIONS[config.task]
    config.model = section(model, without=["image_size"], **row["model"])
    config.objective = section(objective)
    config.optimizer = section(OptimizerOptions, weight_decay=1e-4)
    config.schedules = ConfigDict({
        "learning_rate": schedule("cosine", start=1e-4, end=1.25e-6, steps=steps),
        "temperature": schedule("cosine", start=1.0, end=1 / 16, steps=steps // 2),
        "kl_weight": schedule("cosine", start=0.0, end=6.6, steps=5000),
    })  # fmt: skip
    config.ema = section(AverageOptions, decay=0.999)
    sections.training_loop(config, row["batch_size"], every=5000)
    sections.override(config, *row.get("overrides", []))
    return config
