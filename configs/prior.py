"""The autoregressive prior over text and image tokens (DALL-E, stage two).

    python -m dalle_jax.main --config=configs/prior.py                 # shapes: embedded data, a laptop's CPU
    python -m dalle_jax.main --config=configs/prior.py:small --config.data.path=DIR   # your own images, 32 pixels
    python -m dalle_jax.main --config=configs/prior.py:folder --config.data.path=DIR  # the same, 128 pixels, a GPU
    python -m dalle_jax.main --config=configs/prior.py:classes --config.data.path=DIR # one folder for each class
    python -m dalle_jax.main --config=configs/prior.py --help          # all variants, and the keys that people set

The image tokenizer is trained first if it has not been trained; `config.tokenizer` is its whole configuration. It reads
the prior's data: set `config.data` once. `--config.tokenizer_from=DIR` uses another tokenizer instead. Run the same
command again to resume after an interruption.

`small` and `folder` fix numbers of updates, text vocabulary and text length by the size of the data set (`from_data`),
once, at the beginning. `--config.steps=N`, `--config.text.vocab_size=N` and `--config.text.length=N` set them instead.

`coco` and `cub` learn the paper's evaluation sets with 64 text positions, because their captions are one sentence each.
They keep the paper's 32x32 tokens and attention. `coco` sees its 82,783 images 77 times, `cub` its 5,994 images 213
times. With 64 images in a batch `coco` needs about 42 GiB of memory (docs/speed.md). On a smaller card give
`--config.model.trunk.remat=full`, which computes each layer twice, or `--config.optimizer.accumulate_steps=4`.

`paper`, `5.6b` and `2.8b` are meant for TPU v5p. Parameters, average and optimizer are split over half of the chips,
in two copies (`mesh.data=2`), because over the whole torus of a v5p the compiler gathers at twice the cost. Adam's
first moment of the kernels is bfloat16. v5e and v6e have less memory and need another `model.trunk.remat`. The table in
experiments/results/compile/compile.md has memory, operations and step time for each topology; configs/compile.py
prints them. The widths can be split 128 ways at most: beyond 256 chips give a larger `mesh.data`. On one device give
`--config.mesh.data=1`.

These three have the paper's start tokens, separate unembeddings, float32 residual stream and float32 logits. The two
start tokens make the stream 1,282 positions long; `--config.text.length=254` makes it 1,280, which costs less time in
the attention kernels of TPUs. DALL-E was not trained for guidance. `--config.model.caption_drop=0.1` trains for it: a
tenth of the captions is emptied, and `guidance` can then be used for drawing.

With `--config.data.condition=label` a caption names a class, which becomes one id. Each different caption of the
training split is a class, in alphabetical order. `--config.text.path=FILE` gives the classes instead, one a line. With
`--config.data.condition=none` the prior is unconditional and reads no captions.

`clipgen` draws captions although it is trained without any (CLIP-GEN, arXiv 2203.00386): from CLIP's embedding of the
image in training, and of the caption in drawing. `--config.clip_from=DIR` is the CLIP, which the workdir then holds.

`imagenet` has LlamaGen-B's numbers (arXiv 2406.06525): 12 layers of 768 over 16x16 tokens, 300 epochs, a
tenth of the labels dropped. Its own codes come from `python -m dalle_jax.pretrained llamagen-vq-ds16` and
`--config.tokenizer_from=DIR`. Our guidance of 1 is that paper's 2. The augmentation is ours.

Measured: shapes and emoji, see README.md and experiments/results/; `shape_classes`, see
experiments/results/classes/. Not yet measured: the others.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import dvae, vqgan
from dalle_jax.configuration import sections
from dalle_jax.configuration.config_files import choose
from dalle_jax.configuration.sections import schedule, section
from dalle_jax.configuration.size_rules import SizeRules
from dalle_jax.data.sources.source import DataOptions
from dalle_jax.models.transformer_options import TransformerOptions
from dalle_jax.optim.optimizers import AverageOptions, OptimizerOptions
from dalle_jax.priors.autoregressive import AutoregressiveOptions
from dalle_jax.priors.lora import LoRAOptions

AUGMENTED = dict(augment="prior", bpe_dropout=0.1)
PAPER = dict(
    tokenizer="paper", data=dict(sections.FOLDER, image_size=256, **AUGMENTED),
    text=dict(vocab_size=16_384, length=256), batch_size=1024, steps=430_000,
)  # fmt: skip


def cpu(steps):
    """Overrides for a small model and a short training on a CPU, where float32 is the fast type."""
    return {
        "data_tokens": "once",
        "model.trunk.norm": "rmsnorm",
        "model.trunk.activation": "gelu_tanh",
        "model.trunk.qk_norm": True,
        "model.trunk.dtype": "float32",
        "model.trunk.remat": "none",
        "model.trunk.scan": False,
        "model.tied_embeddings": False,
        "model.embedding_scale": 0.3,
        "optimizer.b2": 0.98,
        "schedules.learning_rate": schedule(
            "warmup_cosine", peak=3e-3, end=1e-5, warmup_steps=steps // 20, steps=steps
        ),
        "ema.every": 1,
        "mesh.data": 1,  # four examples at a time: more devices would wait for each other
        **sections.cadence((steps + 3) // 4),
    }


def one_gpu(steps):
    """Overrides for a training whose length follows the size of a data set."""
    return {
        "schedules.learning_rate": schedule(
            "warmup_cosine", peak=4.5e-4, end=1e-5, warmup_steps=steps // 20, steps=steps
        ),
        **sections.cadence((steps + 19) // 20),
    }


# The model and the numbers of the paper (section 2.2, figures 4 and 10, appendices B.2 and D.2).
AS_IN_THE_PAPER = {
    "model.start_tokens": True,
    "model.tied_embeddings": False,
    "model.caption_drop": 0.0,
    "model.trunk.float32_residual": True,
    "model.trunk.float32_logits": True,
    "optimizer.clip_variance": 5.0,
}
POD = {"optimizer.first_moment": "bfloat16", **sections.split_over_chips(copies=2)}

# LlamaGen (arXiv 2406.06525, section 3.1, and the authors' defaults).
LLAMAGEN = {
    "model.attention": "full",
    "model.tied_embeddings": False,
    "optimizer": section(OptimizerOptions, b2=0.95, weight_decay=0.05, clip_norm=1.0, decay="weights"),
    "schedules.learning_rate": schedule("constant", value=1e-4),
    "ema": section(AverageOptions, decay=0.0),
}

# Configurations of image tokenizers, by the name in front of ":" in `tokenizer`.
TOKENIZERS = {"": dvae, "vqgan": vqgan}

VARIANTS = {
    "shapes": dict(
        doc="drawn shapes, embedded; two CPU cores, 3 minutes",
        tokenizer="shapes", data=sections.SHAPES, text=dict(vocab_size=300, length=20),
        trunk=dict(width=128, depth=5, heads=4), kernel=3, batch_size=4, steps=4200,
        overrides=[cpu, {"model.caption_drop": 0.05}],
    ),
    "shape_classes": dict(
        doc="drawn shapes by class, embedded; two CPU cores, 2 minutes",
        tokenizer="shapes", data=sections.SHAPE_CLASSES, text=dict(vocab_size=30, length=1),
        trunk=dict(width=128, depth=3, heads=4), kernel=3, batch_size=4, steps=2400, overrides=[cpu],
    ),
    "emoji": dict(
        doc="the emoji of an installed font; two CPU cores, 11 minutes",
        tokenizer="emoji", data=dict(sections.EMOJI, bpe_dropout=0.1),
        text=dict(vocab_size=1024, length=20),
        trunk=dict(width=192, depth=6, heads=6), kernel=3, batch_size=4, steps=5000, overrides=[cpu],
    ),
    "small": dict(
        doc="your own images (data.path), 32 or 64 pixels; a laptop or small GPU, time by their number",
        tokenizer="small", data=dict(sections.OWN, bpe_dropout=0.1), text=dict(vocab_size=None, length=None),
        trunk=dict(width=192, depth=6, heads=6), kernel=3, batch_size=4,
        steps=None, from_data=dict(passes=40, min_steps=1500, max_steps=20_000), overrides=[cpu, sections.keep_best],
    ),
    "classes": dict(
        doc="your own images in class folders (data.path), 32 or 64 pixels; a laptop, time by their number",
        tokenizer="small", data=dict(sections.OWN, **sections.CLASSES), text=dict(vocab_size=1000, length=1),
        trunk=dict(width=192, depth=6, heads=6), kernel=3, batch_size=4,
        steps=None, from_data=dict(passes=40, min_steps=1500, max_steps=20_000), overrides=[cpu, sections.keep_best],
    ),
    "clipgen": dict(
        doc="your own images without captions (data.path), and a CLIP (clip_from); a laptop, time by their number",
        tokenizer="small", data=dict(sections.OWN, condition="clip"), text=dict(vocab_size=None, length=None),
        trunk=dict(width=192, depth=6, heads=6), kernel=3, batch_size=4,
        steps=None, from_data=dict(passes=40, min_steps=1500, max_steps=20_000), overrides=[cpu, sections.keep_best],
    ),
    "folder": dict(
        doc="your own images (data.path), 128 pixels; one GPU, not yet measured",
        tokenizer="folder", data=dict(sections.FOLDER, image_size=128, **AUGMENTED),
        text=dict(vocab_size=None, length=None),
        trunk=dict(width=512, depth=12, heads=8), kernel=3, batch_size=64,
        steps=None, from_data=dict(sections.LARGER_TEXT, passes=60, min_steps=5000, max_steps=100_000),
        overrides=[one_gpu],
    ),
    "coco": dict(
        doc="MS-COCO, 77 epochs; one GPU or TPU host, not yet measured",
        tokenizer="coco", data=dict(sections.COCO, **AUGMENTED),
        text=dict(vocab_size=8192, length=64),
        trunk=dict(width=768, depth=24, heads=12), batch_size=64, steps=100_000,
    ),
    "cub": dict(
        doc="CUB-200-2011, 213 epochs; one GPU or TPU host, not yet measured",
        tokenizer="cub", data=dict(sections.CUB, **AUGMENTED),
        text=dict(vocab_size=4096, length=64),
        trunk=dict(width=512, depth=12, heads=8), batch_size=64, steps=20_000,
    ),
    "imagenet": dict(
        doc="ImageNet in class folders (data.path), LlamaGen-B; 8 GPUs, not yet measured",
        tokenizer="vqgan:llamagen_f16", data=sections.IMAGENET, text=dict(vocab_size=1000, length=1),
        trunk=dict(
            width=768, depth=12, heads=12, mlp_ratio=8 / 3, norm="rmsnorm", activation="swiglu", positions="rotary",
            dropout=0.1,
        ),
        batch_size=256, steps=1_501_000, overrides=[LLAMAGEN],
    ),
    "2.8b": dict(
        PAPER, doc="2.8 billion parameters, your own images; TPU v5p:4x4x4, not yet measured",
        trunk=dict(width=1920, depth=64, heads=30), overrides=[AS_IN_THE_PAPER, POD],
    ),
    "5.6b": dict(
        PAPER, doc="5.6 billion parameters, your own images; TPU v5p:4x4x8, not yet measured",
        trunk=dict(width=2688, depth=64, heads=42), overrides=[AS_IN_THE_PAPER, POD],
    ),
    "paper": dict(
        PAPER, doc="the paper's 12 billion parameters, your own images; TPU v5p:4x4x8, not yet measured",
        trunk=dict(width=3968, depth=64, heads=62), overrides=[AS_IN_THE_PAPER, POD],
    ),
}  # fmt: skip

KEYS = sections.TRAINING_KEYS | {
    "tokenizer_from": "directory of a trained or imported image tokenizer to use instead of training one",
    "start_from": "workdir or export of another prior: start from its parameters, tokens and text model",
    "model.trunk.width": "width of the transformer; depth and heads are next to it",
    "model.order": "raster; or diagonal or random, so that sampling.steps can draw several tokens in a step",
    "model.trunk.remat": "kept for gradients: full (least memory), attended, mlp, branches, attention, dots or none",
}


def set_tokenizer(config: ConfigDict, name: str) -> None:
    """Sets the configuration of the image tokenizer: a variant of configs/dvae.py, or "vqgan:VARIANT"."""
    file, _, variant = name.rpartition(":")
    config.tokenizer = TOKENIZERS[file].get_config(variant)
    sections.share_minutes(config, "tokenizer")
    sections.follow_data(config.tokenizer, config.data)


def get_config(variant: str | None = None) -> ConfigDict:
    variant, row = choose(VARIANTS, variant, __file__)

    config = ConfigDict()
    config.job = "train"
    config.task = "prior"
    config.variant = variant
    config.workdir = f"runs/prior-{variant}"
    config.seed = 0
    sections.set_steps(config, row["steps"])
    if "from_data" in row:
        config.from_data = section(SizeRules, **row["from_data"])
    config.tokenizer_from = placeholder(str)
    config.tokenizer_step = placeholder(int)
    config.start_from = placeholder(str)
    config.clip_from = placeholder(str)  # workdir or folder of the CLIP of data.condition=clip
    config.clip_noise = row.get("clip_noise", 0.0)  # length of the noise on its unit vectors in training
    config.low_from = placeholder(str)  # workdir of the smaller images' tokenizer, of data.condition=low_resolution
    config.low_size = placeholder(int)  # height and width of the smaller images; None: half of data.image_size

    config.data = section(DataOptions, **row["data"])
    set_tokenizer(config, row["tokenizer"])
    config.data_tokens = "each_batch"  # "once": encode the training split first; or a folder of configs/encode.py
    config.text = sections.text(**row["text"])
    config.prior = "autoregressive"
    # Keep the products of dense layers and the results of attention; the backward pass computes the rest again.
    trunk = section(TransformerOptions, **{"remat": "dots", **row["trunk"]})
    config.model = section(AutoregressiveOptions, trunk=trunk, kernel=row.get("kernel", 11), tied_embeddings=True)
    # Other orders need dense attention, because the patterns are those of raster order.
    order = config.model.get_oneway_ref("order")
    del config.model["attention"], config.model["neighbour_kernel"]
    config.model.attention = sections.chosen_by(order, {"raster": "sparse", "random": "full", "diagonal": "full"})
    config.model.neighbour_kernel = sections.chosen_by(order, {"raster": "0", "random": "0", "diagonal": "3"}).to_int()
    config.lora = section(LoRAOptions)  # with a rank, adapters of the prior `start_from` are trained alone
    config.optimizer = section(OptimizerOptions, b2=0.96, weight_decay=4.5e-2, clip_norm=4.0)
    # The paper halves the step size five times on plateaus (appendix B.2).
    config.schedules = ConfigDict({"learning_rate": schedule("warmup_constant", value=4.5e-4, warmup_steps=5000)})
    config.ema = section(AverageOptions, decay=0.99, every=25)
    sections.training_loop(config, row["batch_size"], every=5000)
    config.preview = ConfigDict({"captions": ""})  # your own, "a red circle|a green star"; "": held-out examples
    sections.override(config, *row.get("overrides", []))
    return config
