"""Measures of a trained prior's workdir, on a split of its own data set.

    python -m dalle_jax.main --config=configs/evaluate.py --config.model_workdir=runs/prior-shapes

Writes `report.json` and `grid.png`: the tokenizer's PSNR and codebook use, the prior's nats per token and seconds per
picture, and, on the embedded shapes, whether the pictures show what the captions say.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from dalle_jax import config_files

common = config_files.module(__file__, "common.py")


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.job = "evaluate"
    config.workdir = "runs/evaluated"  # where the report goes
    config.model_workdir = "runs/prior-shapes"
    config.step = placeholder(int)  # a checkpoint; None: the latest
    config.seed = 0

    config.split = "heldout"
    config.count = 256  # captions, one sample each
    config.sampling = common.sampling()
    config.rows_at_once = 64
    return config
