"""Measures of trained priors: `report.html`, `report.json`, a grid and the figures of the paper's two sweeps as CSV.

    python -m dalle_jax.main --config=configs/evaluate.py --config.model_workdir=runs/prior-shapes
    python -m dalle_jax.main --config=configs/evaluate.py --config.model_workdir=runs/prior-shapes,runs/maskgit-shapes \
        --config.clip=runs/clip-shapes --config.metrics.candidates=16
    python -m dalle_jax.main --config=configs/evaluate.py:coco --config.model_workdir=DIR --config.data.path=COCO \
        --config.metrics.inception=pt_inception-2015-12-05-6726825d.pth
    python -m dalle_jax.main --config=configs/evaluate.py:cub --config.model_workdir=DIR --config.data.path=CUB …

Without a variant: a held-out split of the model's own data. `coco` and `cub` are DALL-E's evaluation (section 3.1),
whatever the model was trained on: 30,000 captions of MS-COCO's validation split, all unique captions of CUB's test
split. `dalle_jax/evaluation/test_sets.py` says which choices the paper leaves open and which are taken here; they are
written into the report.

Figures: PSNR, SSIM, codebook use and FID of reconstructions; nats per token, seconds per picture; FID, Inception score,
precision and recall where the weights of Inception-v3 are given; the same by CLIP's features (`fid_clip`), CLIP score
and the best of N where a CLIP is; and on the embedded shapes whether pictures show what the captions say.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from dalle_jax.configuration import config_files

common = config_files.module(__file__, "common.py")

# name: (data, None: the model's own; split, captions, how many of them)
VARIANTS = {
    "own": (None, "heldout", "first", 256),
    "coco": (common.coco(), "validation", "drawn", 30_000),
    "cub": (common.cub(), "test", "unique", None),
}
_OF_TRAINING = ("image_size", "augment", "train_split", "eval_split", "cache", "workers", "bpe_dropout")


def get_config(variant: str | None = None) -> ConfigDict:
    variant, (data, split, captions, count) = config_files.choose(VARIANTS, variant, __file__)

    config = ConfigDict()
    config.job = "evaluate"
    config.workdir = "runs/evaluated" if data is None else f"runs/evaluated-{variant}"  # where the report goes
    config.model_workdir = "runs/prior-shapes"  # the prior; or several, separated by commas, side by side
    config.step = placeholder(int)  # a checkpoint; None: the latest
    config.clip = placeholder(str)  # a CLIP's workdir or folder; None: the one in the prior's workdir, if any
    config.seed = 0

    if data is not None:
        config.data = data
        for key in _OF_TRAINING:  # pictures are taken as they are, at the model's size
            del config.data[key]
    config.split = split
    config.captions = captions  # "first" of each picture, one "drawn" of each, or each "unique" one
    config.count = placeholder(int) if count is None else count  # captions, one sample each; None: all

    config.metrics = ConfigDict({
        "inception": placeholder(str),  # the file of Inception-v3's weights; None: without FID and Inception score
        "inception_resize": "bilinear_tf1",  # the original FID's and torch-fidelity's; or "bilinear_half_pixel"
        "blur": (0, 1, 2, 4, 8),  # radii in pixels, on both sides
        "candidates": 0,  # the best of 1, 2, 4, … so many by CLIP; 0: without
        "candidate_captions": 128,  # of so many captions
    })  # fmt: skip
    config.sampling = common.sampling()
    config.rows_at_once = 64  # pictures drawn or judged in one go, by all devices together
    config.mesh = common.mesh()  # see configs/generate.py
    return config
