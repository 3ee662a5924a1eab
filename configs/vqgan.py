"""The image tokenizer as a VQGAN: convolutions, codes, and a discriminator (taming transformers, arXiv 2012.09841).

    python -m dalle_jax.main --config=configs/vqgan.py                  # shapes: embedded data, a laptop's CPU
    python -m dalle_jax.main --config=configs/vqgan.py:small --config.data.path=DIR   # your own images, 32 pixels
    python -m dalle_jax.main --config=configs/vqgan.py:folder --config.data.path=DIR  # the same, 128 pixels, a GPU
    python -m dalle_jax.main --config=configs/vqgan.py --help           # all variants, and the keys that people set

A prior then takes `--config.tokenizer_from=runs/vqgan-small`.

The discriminator starts late, after `schedules.adversarial_weight.wait_steps` updates. The weight of its verdict then
rises for `warmup_steps`. The log has both sides.

`shapes`, `small` and `folder` are small networks of ours. Their codes are running averages that start as clusters, and
unused codes are moved. They need no weights of LPIPS. `small` has model.downsample 4: 8 x 8 tokens at 32 pixels. At 64
pixels, `--config.model.multipliers="(1,2,2,2)"` keeps this grid.

The next four have the numbers of published trainings, with these differences. Both players move at once. The images
are yours, with the dVAE's augmentation.
- `taming_f16`: the batch is 96 (12 on each of 8 devices), and the length is ours. As in the authors' code, the weight
  0.25 is that of the codebook and not of the commitment.
- `gumbel_f8`: GumbelVQ with f = 8. The authors published its sizes, temperature and KL weight. The two players are
  those of `taming_f16`.
- `maskgit`: a PatchGAN with group normalisation in place of StyleGAN's discriminator, whose score for R1 is a mean over
  patches. Pixels have 0.25 of the weight, because losses see them in [-1, 1]. The perceptual loss is off, as in the
  released configuration.
- `llamagen_f16`: Adam without weight decay, as in the authors' code.

`imagenet` is `llamagen_f16` for the 40 epochs of ImageNet that its paper reports (arXiv 2406.06525). It reads images
alone, so that class folders need no captions. With `--config.data.source=imagenet2012` it reads them from TFDS.
`prior.py:imagenet` and `maskgit.py:imagenet256` then use it by `--config.tokenizer_from=runs/vqgan-imagenet`.

Measured: `small` on clip art, four minutes on one core: 24.3 dB on held-out images, where `dvae.py:small` has 33.5
(experiments/results/tokenizers). Not yet measured: the others.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from dalle_jax.configuration import sections
from dalle_jax.configuration.config_files import choose
from dalle_jax.configuration.sections import schedule, section
from dalle_jax.configuration.size_rules import SizeRules
from dalle_jax.data.sources.source import DataOptions
from dalle_jax.image_tokenizers.discriminator import DiscriminatorOptions
from dalle_jax.image_tokenizers.vqgan_options import VQGANOptions
from dalle_jax.optim.optimizers import AverageOptions, OptimizerOptions
from dalle_jax.tasks.vqgan_losses import VQGANObjectiveOptions

# Four pixels a side stand for a token; no convolution has many channels at full resolution.
SMALL_MODEL = dict(
    hidden=32, multipliers=(1, 2, 2), blocks=1, attention_levels=(), latent=64, code_dim=32, norm_groups=8
)
OWN_CODES = dict(codes="average", init="clusters", dead_below=0.3, perceptual_weight=0.0)
SMALL_DISCRIMINATOR = dict(layers=2, filters=32, norm="group")
PUBLISHED = dict(sections.FOLDER, image_size=256, augment="dvae")


def starting_at(wait, value, opponent=1.0, warmup=0):
    """Overrides for the update at which the game begins."""
    return {
        "schedules.adversarial_weight": schedule("delayed", value=value, wait_steps=wait, warmup_steps=warmup),
        "schedules.discriminator_weight": schedule("delayed", value=opponent, wait_steps=wait, warmup_steps=0),
    }


def own(steps):
    """Overrides for a training from scratch whose game takes up its second half."""
    return {
        "optimizer.b1": 0.5,
        "optimizer.b2": 0.99,
        "optimizer.clip_norm": 1.0,
        "schedules.learning_rate": schedule("warmup_cosine", peak=1e-3, end=5e-5, warmup_steps=50, steps=steps),
        "ema.decay": 0.99,
        **starting_at(steps // 2, 0.4, warmup=steps // 10),
        **sections.cadence((steps + 3) // 4),
    }


def one_gpu(steps):
    """Overrides for a larger network and a longer training."""
    return {
        "schedules.learning_rate": schedule("warmup_cosine", peak=2e-4, end=1e-5, warmup_steps=1000, steps=steps),
        "ema.decay": 0.999,
        **sections.cadence((steps + 19) // 20),
    }


TAMING = {
    "optimizer.b1": 0.5,
    "optimizer.b2": 0.9,
    "schedules.learning_rate": schedule("constant", value=96 * 4.5e-6),
    **starting_at(250_001, 0.8),
}
GUMBEL = {
    **TAMING,
    "schedules.temperature": schedule("cosine", start=0.9, end=1e-6, steps=1_000_001),
    "schedules.kl_weight": schedule("constant", value=1e-8),
}
MASKGIT = {
    "optimizer.b1": 0.0,
    "optimizer.b2": 0.99,
    "schedules.learning_rate": schedule("constant", value=1e-4),
    **starting_at(0, 0.1),
}
LLAMAGEN = {
    "optimizer.b2": 0.95,
    "optimizer.clip_norm": 1.0,
    "schedules.learning_rate": schedule("constant", value=1e-4),
    **starting_at(20_000, 0.5, opponent=0.5),
}

# `llamagen_f16` and `imagenet` differ in their length alone.
LLAMAGEN_ROW = dict(
    data=PUBLISHED, model=dict(vocab_size=16_384, code_dim=8, normalized_codes=True, dtype="bfloat16"),
    objective=dict(pixel_loss="l2", adaptive=False), discriminator={}, batch_size=128, overrides=[LLAMAGEN],
)  # fmt: skip

VARIANTS = {
    "shapes": dict(
        doc="drawn shapes, embedded; two CPU cores, not yet measured",
        data=sections.SHAPES, model=dict(vocab_size=512, **SMALL_MODEL), objective=OWN_CODES,
        discriminator=SMALL_DISCRIMINATOR, batch_size=16, steps=400, overrides=[own],
    ),
    "small": dict(
        doc="your own images (data.path), 32 or 64 pixels; a laptop or small GPU, not yet measured",
        data=sections.OWN, model=dict(vocab_size=1024, **SMALL_MODEL), objective=OWN_CODES,
        discriminator=SMALL_DISCRIMINATOR, batch_size=16,
        steps=None, from_data=dict(passes=10, min_steps=1000, max_steps=4000), overrides=[own],
    ),
    "folder": dict(
        doc="your own images (data.path), 128 pixels; one GPU, not yet measured",
        data=dict(sections.FOLDER, image_size=128, augment="dvae"),
        model=dict(
            vocab_size=4096, multipliers=(1, 1, 2, 4), attention_levels=(3,), code_dim=64, dtype="bfloat16",
        ),
        objective=OWN_CODES, discriminator=dict(norm="group", dtype="bfloat16"), batch_size=32,
        steps=None, from_data=dict(passes=60, min_steps=5000, max_steps=60_000), overrides=[own, one_gpu],
    ),
    "taming_f16": dict(
        doc="VQGAN, 1,024 codes, your own images (data.path), 256 pixels; 8 GPUs, not yet measured",
        data=PUBLISHED, model={}, objective=dict(codebook=0.25, commitment=1.0), discriminator={},
        batch_size=96, steps=500_000, overrides=[TAMING],
    ),
    "gumbel_f8": dict(
        doc="GumbelVQ, f = 8, 8,192 codes, your own images (data.path), 256 pixels; 8 GPUs, not yet measured",
        data=PUBLISHED,
        model=dict(vocab_size=8192, multipliers=(1, 1, 2, 4), attention_levels=(3,), quantizer="gumbel"),
        objective={}, discriminator={}, batch_size=96, steps=1_000_000, overrides=[GUMBEL],
    ),
    "maskgit": dict(
        doc="MaskGIT's first stage, your own images (data.path), 256 pixels; TPU pod slice, not yet measured",
        data=PUBLISHED,
        model=dict(
            attention_levels=(), middle_attention=False, decoder_blocks=2, downsampling="average", block_bias=False,
            skip="branch", code_layers=False, pixel_range="unit", dtype="bfloat16",
        ),
        objective=dict(
            pixel_loss="l2", pixel_weight=0.25, perceptual_weight=0.0, adversarial="non_saturating", adaptive=False,
            r1=10.0, entropy=0.1,
        ),
        discriminator=dict(norm="group"), batch_size=256, steps=1_000_000, overrides=[MASKGIT],
    ),
    "llamagen_f16": dict(
        doc="LlamaGen's tokenizer, your own images (data.path), 256 pixels; 8 GPUs, 400,000 updates, not yet measured",
        steps=400_000, **LLAMAGEN_ROW,
    ),
    "imagenet": dict(
        doc="the same on ImageNet in class folders (data.path), 40 epochs; 8 GPUs, not yet measured",
        steps=400_365, **LLAMAGEN_ROW,
    ),
}  # fmt: skip

KEYS = sections.TRAINING_KEYS | {
    "start_from": "workdir of another VQGAN training, or an imported VQGAN: start from its parameters",
    "model.vocab_size": "number of codes",
    "objective.perceptual_weight": "weight of the perceptual loss; 0: none",
    "objective.lpips": "folder of the weights of LPIPS, see python -m dalle_jax.pretrained --list",
    "objective.clip": "or: workdir of a CLIP, whose features compare images instead",
    "schedules.adversarial_weight.value": "weight of the adversarial loss after its start",
    "schedules.adversarial_weight.wait_steps": "updates before it, and the discriminator, start",
}


def get_config(variant: str | None = None) -> ConfigDict:
    variant, row = choose(VARIANTS, variant, __file__)

    config = ConfigDict()
    config.job = "train"
    config.task = "vqgan"
    config.variant = variant
    config.workdir = f"runs/vqgan-{variant}"
    config.seed = 0
    steps = sections.set_steps(config, row["steps"])
    if "from_data" in row:
        config.from_data = section(SizeRules, without=["max_vocab_size", "max_text_length"], **row["from_data"])
    config.start_from = placeholder(str)

    config.data = section(DataOptions, **row["data"])
    config.model = section(VQGANOptions, without=["image_size"], **row["model"])
    config.objective = section(VQGANObjectiveOptions, **row["objective"])
    config.discriminator = section(DiscriminatorOptions, **row["discriminator"])
    config.optimizer = section(OptimizerOptions, parts={"discriminator": {}})
    config.schedules = ConfigDict({
        "learning_rate": {},
        "adversarial_weight": {},
        "discriminator_weight": {},
        "temperature": schedule("cosine", start=1.0, end=1 / 16, steps=steps // 2),  # with model.quantizer=gumbel
        "kl_weight": schedule("constant", value=5e-4),  # with model.quantizer=gumbel
    })  # fmt: skip
    config.ema = section(AverageOptions)
    sections.training_loop(config, row["batch_size"], every=5000)
    sections.override(config, *row["overrides"])
    # Both players start together, unless the discriminator's start is set.
    start = config.schedules.adversarial_weight.get_oneway_ref("wait_steps")
    sections.override(config, {"schedules.discriminator_weight.wait_steps": start})
    return config
