"""Evaluation of trained priors: `report.html`, `report.json`, an image grid, and the paper's two sweeps as CSV.

    python -m dalle_jax.main --config=configs/evaluate.py --config.model_workdir=runs/prior-shapes
    python -m dalle_jax.main --config=configs/evaluate.py --config.model_workdir=runs/prior-shapes,runs/maskgit-shapes \
        --config.clip=runs/clip-shapes --config.metrics.candidates=16
    python -m dalle_jax.main --config=configs/evaluate.py:coco --config.model_workdir=DIR --config.data.path=COCO \
        --config.metrics.inception=pt_inception-2015-12-05-6726825d.pth

    python -m dalle_jax.main --config=configs/evaluate.py:imagenet --config.model_workdir=DIR \
        --config.reference=VIRTUAL_imagenet256_labeled.npz \
        --config.metrics.inception=pt_inception-2015-12-05-6726825d.pth

`own` measures a held-out split of the model's own data. `coco` and `cub` are DALL-E's evaluation (section 3.1) for any
model. The paper leaves some choices open; `dalle_jax/evaluation/test_sets.py` lists ours, and the report contains them.

`imagenet` draws classes: 50,000 images, as many of each class, against published statistics, a folder or the model's
own data (`dalle_jax/evaluation/by_class.py`).

Metrics: PSNR, SSIM, codebook use and FID of reconstructions; nats per token and seconds per image. With the weights of
Inception-v3: FID, Inception score, precision and recall. With a CLIP: the same by its features (`fid_clip`), CLIP score
and the best of N. On the embedded shapes: whether the images show what the captions state.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from dalle_jax.configuration import sections
from dalle_jax.configuration.config_files import choose
from dalle_jax.configuration.sections import section
from dalle_jax.data.sources.source import DataOptions
from dalle_jax.evaluation.by_class import ClassMetrics, ClassProtocol
from dalle_jax.evaluation.measure import Options
from dalle_jax.priors.sampling import SamplingOptions

VARIANTS = {
    "own": dict(
        doc="a held-out split of the model's own data; shapes: two CPU cores, 1 minute",
        split="heldout", captions="first", count=256,
    ),
    "coco": dict(
        doc="30,000 captions of MS-COCO's validation split; one GPU, not yet measured",
        data=sections.COCO, split="validation", captions="drawn", count=30_000,
    ),
    "cub": dict(
        doc="all unique captions of CUB's test split; one GPU, not yet measured",
        data=sections.CUB, split="test", captions="unique", count=None,
    ),
    "imagenet": dict(doc="50,000 images of a prior of classes, against ADM's statistics; one GPU, not yet measured"),
}  # fmt: skip
# The images are used as they are, at the model's size.
_OF_TRAINING = (
    "image_size", "augment", "train_split", "eval_split", "cache", "cache_bytes", "workers", "bpe_dropout", "condition",
)  # fmt: skip

KEYS = {
    "workdir": "directory of the report",
    "model_workdir": "workdir of the prior; or several, separated by commas, to compare",
    "step": "checkpoint: a step, best, or None for the latest",
    "clip": "workdir or folder of a CLIP; None: the one in the prior's workdir, if any",
    "split": "split of the data set",
    "captions": '"first" of each image, one "drawn" of each, or each "unique" one',
    "count": "number of captions, with one sample each; None: all",
    "reference": "imagenet: npz file of statistics, or folder of real images; None: the model's own data",
    "metrics.inception": "file of Inception-v3's weights; None: no FID and no Inception score",
    "metrics.candidates": "largest N of the best of N by CLIP; 0: no such sweep",
    "metrics.classifier": "imagenet: train a linear classifier on the samples, test it on the real images",
    "rows_at_once": "images per batch, over all devices; fewer need less memory",
    **sections.SAMPLING_KEYS,
}


def get_config(variant: str | None = None) -> ConfigDict:
    variant, row = choose(VARIANTS, variant, __file__)

    config = ConfigDict()
    by_class = variant == "imagenet"
    config.job = "evaluate_classes" if by_class else "evaluate"
    config.workdir = "runs/evaluated" if variant == "own" else f"runs/evaluated-{variant}"
    config.model_workdir = "runs/prior-shapes"
    config.step = placeholder(object)  # a number or "best"
    config.clip = placeholder(str)
    config.seed = 0

    if "data" in row:
        data = {key: value for key, value in row["data"].items() if key not in _OF_TRAINING}
        config.data = section(DataOptions, without=_OF_TRAINING, **data)
    if by_class:
        config.update(section(ClassProtocol))
        config.metrics = section(ClassMetrics)
    else:
        config.split = row["split"]
        config.captions = row["captions"]
        config.count = placeholder(int) if row["count"] is None else row["count"]
        config.metrics = section(Options, without=["seed"])
    config.sampling = section(SamplingOptions)
    config.rows_at_once = 64
    config.mesh = sections.mesh()  # images over all devices; fsdp, tensor: split a prior that one device cannot hold
    return config
