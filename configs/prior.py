"""The autoregressive prior over text and image tokens (DALL-E, stage two).

    python -m dalle_jax.main --config=configs/prior.py                 # shapes: embedded data, a laptop's CPU
    python -m dalle_jax.main --config=configs/prior.py:emoji           # the emoji of an installed font
    python -m dalle_jax.main --config=configs/prior.py:folder --config.data.path=DIR
    python -m dalle_jax.main --config=configs/prior.py:coco --config.data.path=DIR
    python -m dalle_jax.main --config=configs/prior.py:cub --config.data.path=DIR
    python -m dalle_jax.main --config=configs/prior.py:paper --config.data.path=DIR --config.tokenizer_from=DVAE_DIR

Where the image tokenizer has not been trained, that is done first (`config.tokenizer` is its whole configuration).
Run the same command again to go on after an interruption.

`coco` and `cub` learn the paper's evaluation sets on one GPU or one TPU host: 64 text positions (their captions are a
sentence each), the paper's 32x32 tokens and attention, and a width and length for so many pictures: 82,783 with five
captions each, seen 77 times, or 5,994 with ten, seen 213 times. A dVAE trained on more pictures than CUB's, the
published one for instance, can stand in: `--config.tokenizer_from=DIR`.

`paper`, `5.6b` and `2.8b` split parameters, average and optimizer over half of the chips (`mesh.data=2`, two copies:
over the whole of a v5p's torus the compiler gathers at twice the cost), keep the products of dense layers and what
attention gives (`remat=dots`), and Adam's first moment in bfloat16. They are meant for v5p; v5e and v6e have less
memory, and want the `--config.model.trunk.remat` of the table. By the TPU compiler, of each chip, at batch 1,024
(configs/compile.py prints them; experiments/results/compile/compile.md has more):

    variant  topology  chips                   GiB        TFLOP of model, program   step, of the peak by the roofline
    paper    v5p:4x4x8   128                   71.6 of 95    755.4   747.5    2393 ms   69%
    paper    v5e:16x16   256  remat=full       11.5 of 16    377.7   487.4    3508 ms   55%
    paper    v6e:16x16   256  remat=attention  25.9 of 32    377.7   456.4    1009 ms   41%
    5.6b     v5p:4x4x8   128                   47.1 of 95    350.1   344.7    1234 ms   62%
    5.6b     v5e:8x16    128  remat=full       10.9 of 16    350.1   448.9    3230 ms   55%
    5.6b     v6e:8x16    128  remat=attended   18.9 of 32    350.1   448.9     955 ms   40%
    2.8b     v5p:4x4x4    64                   64.8 of 95    362.2   354.5    1387 ms   57%
    2.8b     v5e:8x16    128  remat=full        7.2 of 16    181.1   230.4    1795 ms   51%
    2.8b     v6e:8x8      64  remat=attended   23.7 of 32    362.2   460.8    1092 ms   36%

(The program's operations are without those of attention kernels.) The widths can be split 128 ways at most: beyond
256 chips, a larger `mesh.data`; on one device, `--config.mesh.data=1`.

Measured: shapes and emoji, see README.md and experiments/results/. Not yet measured: folder, coco, cub, 2.8b, 5.6b,
paper.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from dalle_jax.configuration import config_files

common = config_files.module(__file__, "common.py")
schedule = common.schedule

# name: (tokenizer's variant, data, text length, text vocabulary, width, depth, heads, batch, steps)
VARIANTS = {
    "shapes": ("shapes", common.shapes(), 20, 300, 128, 5, 4, 4, 4200),
    "emoji": ("emoji", common.emoji(bpe_dropout=0.1), 20, 1024, 192, 6, 6, 4, 5000),
    "folder": ("folder", common.folder(128, augment="prior", bpe_dropout=0.1), 64, 8192, 512, 12, 8, 64, 100_000),
    "coco": ("coco", common.coco(augment="prior", bpe_dropout=0.1), 64, 8192, 768, 24, 12, 64, 100_000),
    "cub": ("cub", common.cub(augment="prior", bpe_dropout=0.1), 64, 4096, 512, 12, 8, 64, 20_000),
    "2.8b": ("paper", common.folder(256, augment="prior", bpe_dropout=0.1), 256, 16_384, 1920, 64, 30, 1024, 430_000),
    "5.6b": ("paper", common.folder(256, augment="prior", bpe_dropout=0.1), 256, 16_384, 2688, 64, 42, 1024, 430_000),
    "paper": ("paper", common.folder(256, augment="prior", bpe_dropout=0.1), 256, 16_384, 3968, 64, 62, 1024, 430_000),
}


def get_config(variant: str | None = None) -> ConfigDict:
    variant, row = config_files.choose(VARIANTS, variant, __file__)
    tokenizer, data, text_length, text_vocab, width, depth, heads, batch, steps = row
    small = variant in ("shapes", "emoji")  # sized for a CPU, where float32 is the fast type
    large = variant in ("2.8b", "5.6b", "paper")  # for pods

    config = ConfigDict()
    config.job = "train"
    config.task = "prior"
    config.variant = variant
    config.workdir = f"runs/prior-{variant}"
    config.seed = 0
    length = common.set_steps(config, steps)
    config.tokenizer = config_files.module(__file__, "dvae.py").get_config(tokenizer)
    config.tokenizer_from = placeholder(str)  # a workdir or an imported tokenizer to use instead

    config.start_from = placeholder(str)  # another prior's workdir: its parameters where they fit, and its tokens
    config.data = data
    config.data_tokens = "once" if small else "each_batch"
    config.text = ConfigDict({"vocab_size": text_vocab, "length": text_length, "path": placeholder(str)})

    config.prior = "autoregressive"
    config.model = ConfigDict({
        "trunk": {
            "width": width, "depth": depth, "heads": heads, "mlp_ratio": 4.0,
            "norm": "rmsnorm" if small else "layernorm", "activation": "gelu_tanh" if small else "gelu",
            "qk_norm": small, "positions": "learned", "dropout": 0.0,
            "dtype": "float32" if small else "bfloat16", "remat": "none" if small else "dots" if large else "full",
            "scan": not small,
            "attention_kernel": "auto",
        },
        "attention": "sparse",
        "kernel": 11 if data.image_size == 256 else 3,
        "wrap": True,
        "tied_embeddings": not small,
        "embedding_scale": 0.3 if small else 0.02,
        "head_scale": 0.02,
        "codebook_init": False,
        "text_weight": 1 / 8,
        "caption_drop": 0.05 if variant == "shapes" else 0.1,
    })  # fmt: skip

    config.optimizer = ConfigDict({
        "b1": 0.9, "b2": 0.98 if small else 0.96, "eps": 1e-8, "weight_decay": 4.5e-2, "decay": "kernels",
        "clip_norm": 4.0, "accumulate_steps": 1, "first_moment": "bfloat16" if large else "float32",
    })  # fmt: skip
    if small:
        rate = schedule("warmup_cosine", peak=3e-3, end=1e-5, warmup_steps=length // 20, steps=length)
    else:  # the paper halves the step size five times on plateaus; see its appendix B.2
        rate = schedule("warmup_constant", value=4.5e-4, warmup_steps=5000)
    config.schedules = ConfigDict({"learning_rate": rate})
    config.ema = ConfigDict({"decay": 0.99, "every": 1 if small else 25})
    every = (length + 3) // 4 if small else 5000
    common.run(config, batch_size=batch, every=every, split=2 if large else 0)
    if small:
        config.mesh.data = 1  # four examples at a time: more devices would wait for each other
    return config
