"""Captions to pictures from a trained prior's workdir.

    python -m dalle_jax.main --config=configs/generate.py --config.model_workdir=runs/prior-shapes \
        --config.prompts="a red circle above a blue square|a large green cross" --config.n=4

With `--config.clip=runs/clip-shapes --config.candidates=16`, the best 4 of 16 by CLIP, their scores in the manifest.

Writes one PNG a sample, `grid.png`, and `manifest.json`, from which `dalle_jax.jobs.generate.remake(manifest, file)`
makes each picture again. Runs wherever the prior was trained; a laptop's CPU is enough for shapes and emoji.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from dalle_jax.configuration import config_files

common = config_files.module(__file__, "common.py")


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.job = "generate"
    config.workdir = "runs/generated"  # where the pictures go
    config.model_workdir = "runs/prior-shapes"  # the prior
    config.step = placeholder(int)  # a checkpoint; None: the latest
    config.seed = 0

    config.prompts = ""  # captions, separated by "|"
    config.prompts_file = ""  # or a file with one caption a line
    config.negative = ""  # a caption that guidance leads away from
    config.n = 4  # pictures for each
    config.clip = placeholder(str)  # a CLIP's workdir or folder; None: the one in the prior's workdir, if any
    config.candidates = 0  # draw so many for each, and keep the n that CLIP finds fittest; 0: draw n
    config.sampling = common.sampling()
    config.rows_at_once = 64  # pictures drawn in one go, by all devices together: bounds the memory
    config.mesh = common.mesh()  # rows over all devices; fsdp, tensor: split a prior that one device cannot hold
    return config
