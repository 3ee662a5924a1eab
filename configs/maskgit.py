"""The MaskGIT prior: a bidirectional transformer that draws all image tokens in a few steps (arXiv 2202.04200).

    python -m dalle_jax.main --config=configs/maskgit.py               # shapes: embedded data, a laptop's CPU
    python -m dalle_jax.main --config=configs/maskgit.py:small --config.data.path=DIR   # your own images, 32 pixels
    python -m dalle_jax.main --config=configs/maskgit.py:folder --config.data.path=DIR  # the same, 128 pixels, a GPU
    python -m dalle_jax.main --config=configs/maskgit.py:classes --config.data.path=DIR # one folder for each class
    python -m dalle_jax.main --config=configs/maskgit.py --help        # all variants, and the keys that people set

Data, text, image tokenizer and loop are those of configs/prior.py. The image tokenizer is trained first if it has not
been trained. `--config.start_from=runs/prior-shapes` starts from the parameters, tokenizer and text model of an
autoregressive prior with the same trunk, and needs far fewer updates (the quickstart does so).

`paper` and `coco` have the paper's size (24 layers of 768), `3b` that of Muse's base model, `cub` that of
configs/prior.py:cub; all over 32x32 tokens. Each update scores two thirds of an image's tokens, other ones each time.
So `coco` and `cub` train twice as long as the autoregressive priors.

`paper` has the numbers of the released configuration: 2,000,000 updates, an average at each update, no clipping,
dropout of attention probabilities, and BERT's initialisation. Its net differs as `dalle_jax/priors/maskgit.py` says.
The paper has no guidance: give `--config.model.caption_drop=0.1` to train for it. The loss of the reference code is
`--config.model.loss_average=images`. `python experiments/papers.py` compares the variant with the paper.

Attention with dropout runs in XLA, also on TPUs. `--config.model.trunk.attention_dropout=0` trains with the faster
splash kernel. By roofline on v5e:4x4, an update takes 718 ms with dropout (compiled with low effort). It took 343 ms
with the kernel, `model.trunk.remat=dots` and a bfloat16 stream (full effort).

`imagenet256` and `imagenet512` are the released class-conditional models, whose blocks are post-norm with biases. Their
class reads the image, too. A tenth of the labels is dropped for guidance, which the paper does not have.
`python -m dalle_jax.pretrained maskgit-imagenet256` imports the published weights as a run of the same model.

`paper` splits parameters, average and optimizer over all chips, `3b` over half of them. The table in
experiments/results/compile/compile.md has memory, operations and step time for each topology.

`upsample` enlarges images, as Muse's second stage does. An encoder reads the caption and the tokens of the smaller
image (dalle_jax/priors/low_resolution.py). `--config.low_from=DIR` is the workdir of the smaller images' tokenizer, or
of a prior that draws them.

`small` learns from scratch. The first third of its updates predicts tokens in raster order (`model.raster_steps`).

Measured on `shapes`, held-out captions, 8 decoding steps. Two CPU cores: 0.62 of the captions right after 7,000 updates
from scratch; 0.89 and 0.99 (on two processors) after 2,600 updates from the autoregressive prior. One core: 0.99 after
4,200 updates from scratch with `--config.steps=4200 --config.model.raster_steps=1400` and
`--config.schedules.learning_rate.peak=3e-3`. `emoji`: experiments/results/emoji/. `upsample`:
experiments/results/upsampling/. Not yet measured: the others.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import prior
from dalle_jax.configuration import sections
from dalle_jax.configuration.config_files import choose
from dalle_jax.configuration.sections import schedule, section
from dalle_jax.configuration.size_rules import SizeRules
from dalle_jax.models.transformer_options import TransformerOptions
from dalle_jax.optim.optimizers import AverageOptions, OptimizerOptions
from dalle_jax.priors.maskgit_model import MaskGITOptions


def cpu(steps):
    """Overrides for a small model and a short training on a CPU. They learn faster than the paper's model."""
    return {
        "model.head": "linear",
        "model.tied_embeddings": False,
        "model.embedding_scale": 1.0,
        "model.head_scale": 0.5,
        "model.codebook_init": True,
        "model.neighbour_kernel": 3,
        "model.label_smoothing": 0.0,
        "model.steps": 8,
        "schedules.learning_rate": schedule(
            "warmup_cosine", peak=2e-3, end=1e-5, warmup_steps=steps // 20, steps=steps
        ),
        "mesh.data": 1,  # four examples at a time: more devices would wait for each other
        **sections.cadence((steps + 3) // 4),
    }


def small(steps):
    """Overrides that learn as fast as the autoregressive prior: raster order first, see `MaskGITOptions`."""
    return {"model.raster_steps": steps // 3, "schedules.learning_rate.peak": 3e-3}


def paper(steps):
    """Overrides of the released configuration, whatever configs/prior.py:paper has for DALL-E."""
    del steps
    return {
        "model.trunk.activation": "gelu_tanh",
        "model.trunk.attention_dropout": 0.1,
        "model.trunk.remat": "attended",  # the probabilities of attention are in memory, with dropout
        "model.init_scale": 0.02,
        "model.caption_drop": 0.0,
        "model.steps": placeholder(int),
        "optimizer": section(OptimizerOptions, b2=0.96, weight_decay=4.5e-2),
        "ema": section(AverageOptions, decay=0.999),
    }


def one_gpu(steps):
    """Overrides for a training whose length follows the size of a data set."""
    return {
        "schedules.learning_rate": schedule(
            "warmup_cosine", peak=1e-4, end=1e-6, warmup_steps=steps // 20, steps=steps
        ),
        **sections.cadence((steps + 19) // 20),
    }


# The released class-conditional models (google-research/maskgit), as `pretrained/maskgit.py` imports them.
RELEASED = {
    "model.trunk": section(
        TransformerOptions, width=768, depth=24, heads=16, norm_placement="post", norm_epsilon=1e-12,
        embedding_norm=True, final_norms=0, activation="gelu_tanh", qkv_bias=True, positions="table", dropout=0.1,
        attention_dropout=0.1, remat="attended",
    ),
    "model.head_activation": "gelu_tanh",
    "model.text_reads_image": True,
    "model.loss_average": "images",
    "model.init_scale": 0.02,
    "model.steps": placeholder(int),
    "optimizer": section(OptimizerOptions, b2=0.96, weight_decay=4.5e-2),
    "ema": section(AverageOptions, decay=0.999),
}  # fmt: skip

# 32 x 32 pixels become 64 x 64, and 8 x 8 tokens become 16 x 16.
ENLARGING = {
    "data.condition": "low_resolution",
    "model.encoder_depth": 2,
    "tokenizer.model.tokens_per_side": 16,
}

VARIANTS = {
    "shapes": dict(
        doc="drawn shapes, embedded; two CPU cores, 6 minutes",
        prior="shapes", trunk=dict(width=128, depth=5, heads=4), batch_size=4, steps=7000, overrides=[cpu],
    ),
    "shape_classes": dict(
        doc="drawn shapes by class, embedded; two CPU cores, 4 minutes",
        prior="shape_classes", trunk=dict(width=128, depth=3, heads=4), batch_size=4, steps=6000,
        overrides=[cpu, small],
    ),
    "emoji": dict(
        doc="the emoji of an installed font; two CPU cores, 7 minutes if started from the prior",
        prior="emoji", trunk=dict(width=192, depth=6, heads=6), batch_size=4, steps=5000, overrides=[cpu],
    ),
    "small": dict(
        doc="your own images (data.path), 32 or 64 pixels; a laptop or small GPU, time by their number",
        prior="small", trunk=dict(width=192, depth=6, heads=6), batch_size=4,
        steps=None, from_data=dict(passes=60, min_steps=4200, max_steps=20_000),
        overrides=[cpu, small, sections.keep_best],
    ),
    "classes": dict(
        doc="your own images in class folders (data.path), 32 or 64 pixels; a laptop, time by their number",
        prior="classes", trunk=dict(width=192, depth=6, heads=6), batch_size=4,
        steps=None, from_data=dict(passes=60, min_steps=4200, max_steps=20_000),
        overrides=[cpu, small, sections.keep_best],
    ),
    "clipgen": dict(
        doc="your own images without captions (data.path), and a CLIP (clip_from); a laptop, time by their number",
        prior="clipgen", trunk=dict(width=192, depth=6, heads=6), batch_size=4,
        steps=None, from_data=dict(passes=60, min_steps=4200, max_steps=20_000),
        overrides=[cpu, small, sections.keep_best],
    ),
    "upsample": dict(
        doc="enlarges 32 to 64 pixels: your own images (data.path, low_from); a laptop, time by their number",
        prior="small", image_size=64, trunk=dict(width=128, depth=4, heads=4), batch_size=4,
        steps=None, from_data=dict(passes=10, min_steps=2400, max_steps=20_000),
        overrides=[cpu, small, sections.keep_best, ENLARGING],
    ),
    "folder": dict(
        doc="your own images (data.path), 128 pixels; one GPU, not yet measured",
        prior="folder", trunk=dict(width=512, depth=12, heads=8, dropout=0.1), batch_size=64,
        steps=None, from_data=dict(sections.LARGER_TEXT, passes=120, min_steps=5000, max_steps=100_000),
        overrides=[one_gpu],
    ),
    "coco": dict(
        doc="MS-COCO; one GPU or TPU host, not yet measured",
        prior="coco", trunk=dict(width=768, depth=24, heads=12, dropout=0.1), batch_size=64, steps=200_000,
    ),
    "cub": dict(
        doc="CUB-200-2011; one GPU or TPU host, not yet measured",
        prior="cub", trunk=dict(width=512, depth=12, heads=8, dropout=0.1), batch_size=64, steps=40_000,
    ),
    "paper": dict(
        doc="the paper's size, your own images (data.path); TPU v5e:4x4 or v6e:2x4, not yet measured",
        prior="paper", trunk=dict(width=768, depth=24, heads=16, dropout=0.1), batch_size=256, steps=2_000_000,
        overrides=[sections.split_over_chips(copies=1), paper],
    ),
    "imagenet256": dict(
        doc="ImageNet in class folders (data.path), 256 pixels; TPU v5e:4x4 or 8 GPUs, not yet measured",
        prior="imagenet", tokenizer="vqgan:maskgit", trunk={}, batch_size=256, steps=2_000_000, overrides=[RELEASED],
    ),
    "imagenet512": dict(
        doc="the same with 512 pixels and 32x32 tokens; TPU v5e:4x4 or 8 GPUs, not yet measured",
        prior="imagenet", tokenizer="vqgan:maskgit", image_size=512, trunk={}, batch_size=256, steps=2_000_000,
        overrides=[RELEASED],
    ),
    "3b": dict(
        doc="the size of Muse's base model, your own images; TPU v5p:4x4x4 or v6e:8x8, not yet measured",
        prior="paper", trunk=dict(width=2048, depth=48, heads=16, dropout=0.1), batch_size=512, steps=1_000_000,
        overrides=[sections.split_over_chips(copies=2), {"model.caption_drop": 0.1}],
    ),
}  # fmt: skip

KEYS = {key: meaning for key, meaning in prior.KEYS.items() if key != "model.order"} | {
    "model.steps": "decoding steps of previews and samples; None: the paper's 8 or 12, by the number of tokens",
    "model.raster_steps": "first updates that predict tokens in raster order; they make a short training much better",
}


def get_config(variant: str | None = None) -> ConfigDict:
    variant, row = choose(VARIANTS, variant, __file__)

    config = prior.get_config(row["prior"])
    config.variant = variant
    config.workdir = f"runs/maskgit-{variant}"
    sections.set_steps(config, row["steps"])
    config.data.image_size = row.get("image_size", config.data.image_size)
    if "tokenizer" in row:
        prior.set_tokenizer(config, row["tokenizer"])
    if "from_data" in row:
        config.from_data = section(SizeRules, **row["from_data"])

    config.prior = "maskgit"
    trunk = config.model.trunk
    caption_drop = config.model.caption_drop or MaskGITOptions.caption_drop  # DALL-E had none; MaskGIT's are guided
    trunk.float32_logits, config.optimizer.clip_variance = False, 0.0  # DALL-E's
    trunk.update(row["trunk"])
    config.model = section(MaskGITOptions, trunk=trunk, caption_drop=caption_drop, steps=18)
    config.schedules = ConfigDict({"learning_rate": schedule("warmup_constant", value=1e-4, warmup_steps=5000)})
    sections.training_loop(config, row["batch_size"], every=5000)
    sections.override(config, *row.get("overrides", []))
    return config
