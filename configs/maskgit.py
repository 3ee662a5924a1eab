"""The MaskGIT prior: a bidirectional transformer that draws all image tokens in a few steps (arXiv 2202.04200).

    python -m dalle_jax.main --config=configs/maskgit.py               # shapes: embedded data, a laptop's CPU
    python -m dalle_jax.main --config=configs/maskgit.py:emoji         # the emoji of an installed font
    python -m dalle_jax.main --config=configs/maskgit.py:folder --config.data.path=DIR
    python -m dalle_jax.main --config=configs/maskgit.py:coco --config.data.path=DIR
    python -m dalle_jax.main --config=configs/maskgit.py:cub --config.data.path=DIR
    python -m dalle_jax.main --config=configs/maskgit.py:paper --config.data.path=DIR --config.tokenizer_from=DVAE_DIR

Data, text, image tokenizer and loop are those of `prior.py`; where the image tokenizer has not been trained, that is
done first. `paper` and `coco` have the paper's size (24 layers of 768), `3b` that of Muse's base model, `cub` that of
`prior.py:cub`; all over 32x32 tokens. A masked prior is scored on two thirds of the tokens of a picture at a time, and
each time on others: `coco` and `cub` train for twice as long as the autoregressive ones.

Where an autoregressive prior of the same trunk is there already, `--config.start_from=runs/prior-shapes` takes over its
parameters, tokenizer and text model: far fewer updates are needed (the quickstart does so).

`paper` splits parameters, average and optimizer over all chips, `3b` over half of them, as `prior.py:paper` does. By
the TPU compiler, of each chip (configs/compile.py prints them; experiments/results/compile/compile.md has more):

    variant  topology  chips                   GiB        TFLOP of model, program   step, of the peak by the roofline
    paper    v5e:4x4      16                   11.5 of 16     30.8    25.8     343 ms   46%
    paper    v5p:2x2x2     8  data=2           21.2 of 95     61.6    51.7     387 ms   35%
    paper    v6e:2x4       8                   22.8 of 32     61.6    51.7     342 ms   20%
    3b       v5p:4x4x4    64                   21.9 of 95    164.6   151.6     509 ms   70%
    3b       v5e:8x8      64  remat=attention  13.2 of 16    164.6   172.2    1222 ms   68%
    3b       v6e:8x8      64                   21.8 of 32    164.6   151.6     380 ms   47%

Measured on `shapes`, two CPU cores, captions held out of training, 8 steps: 7,000 updates from scratch, 6 minutes, 0.62
of the captions right; 2,600 from the autoregressive prior, 2 to 4 minutes, 0.89 and 0.99 on two processors. `emoji`:
experiments/results/emoji/.
Not yet measured: the others.
"""

from ml_collections import ConfigDict

from dalle_jax.configuration import config_files

common = config_files.module(__file__, "common.py")
autoregressive = config_files.module(__file__, "prior.py")

# name: (variant of prior.py, width, depth, heads, dropout, batch, steps)
VARIANTS = {
    "shapes": ("shapes", 128, 5, 4, 0.0, 4, 7000),
    "emoji": ("emoji", 192, 6, 6, 0.0, 4, 5000),
    "folder": ("folder", 512, 12, 8, 0.1, 64, 100_000),
    "coco": ("coco", 768, 24, 12, 0.1, 64, 200_000),
    "cub": ("cub", 512, 12, 8, 0.1, 64, 40_000),
    "paper": ("paper", 768, 24, 16, 0.1, 256, 500_000),
    "3b": ("paper", 2048, 48, 16, 0.1, 512, 1_000_000),
}


def get_config(variant: str | None = None) -> ConfigDict:
    variant, (base, width, depth, heads, dropout, batch, steps) = config_files.choose(VARIANTS, variant, __file__)
    small = variant in ("shapes", "emoji")  # sized for a CPU
    copies = {"paper": 1, "3b": 2}.get(variant, 0)  # of the parameters, split over pods; see common.run

    config = autoregressive.get_config(base)
    config.variant = variant
    config.workdir = f"runs/maskgit-{variant}"
    length = common.set_steps(config, steps)

    config.prior = "maskgit"
    trunk = config.model.trunk
    trunk.update({"width": width, "depth": depth, "heads": heads, "dropout": dropout})
    config.model = ConfigDict({
        "trunk": trunk,
        "head": "linear" if small else "mlm",
        "tied_embeddings": not small,
        "embedding_scale": 1.0 if small else 0.02,
        "head_scale": 0.5 if small else 0.02,
        "codebook_init": small,
        "neighbour_kernel": 3 if small else 0,
        "mask_schedule": "cosine",
        "label_smoothing": 0.0 if small else 0.1,
        "unmasked_weight": 0.0,
        "caption_drop": config.model.caption_drop,
        "steps": 8 if small else 18,
        "order": "confidence",
        "choice_temperature": 4.5,
    })  # fmt: skip

    if not small:
        rate = common.schedule("warmup_constant", value=1e-4, warmup_steps=5000)
    else:
        rate = common.schedule("warmup_cosine", peak=2e-3, end=1e-5, warmup_steps=length // 20, steps=length)
    config.schedules = ConfigDict({"learning_rate": rate})
    common.run(config, batch_size=batch, every=(length + 3) // 4 if small else 5000, split=copies)
    if small:
        config.mesh.data = 1  # four examples at a time: more devices would wait for each other
    return config
