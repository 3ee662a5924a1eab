"""Images for captions, from the workdir of a trained prior.

    python -m dalle_jax.main --config=configs/generate.py --config.model_workdir=runs/prior-shapes \
        --config.prompts="a red circle above a blue square|a large green cross" --config.n=4

`--config.clip=runs/clip-shapes --config.candidates=16` keeps the best 4 of 16 by CLIP, with their scores in the
manifest.

Writes one PNG per sample, `grid.png`, and `manifest.json`, from which `dalle_jax.jobs.generate.remake(manifest, file)`
draws an image again. Runs wherever the prior was trained; a laptop's CPU is enough for shapes and emoji.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from dalle_jax.configuration import sections
from dalle_jax.configuration.sections import section
from dalle_jax.priors.sampling import SamplingOptions

KEYS = {
    "workdir": "directory of the images",
    "model_workdir": "workdir of the prior",
    "step": "checkpoint: a step, best, or None for the latest",
    "seed": "seed of the samples",
    "prompts": 'captions, separated by "|"',
    "prompts_file": "or a file with one caption per line",
    "negative": "caption that guidance leads away from; needs sampling.guidance",
    "n": "images per caption",
    "clip": "workdir or folder of a CLIP; None: the one in the prior's workdir, if any",
    "candidates": "samples per caption, of which CLIP keeps the best n; 0: draw n",
    "upsampler": "workdir of a prior that enlarges the images, if any; upsampler_sampling has the keys of sampling",
    "weights": "int8: kernels of one byte per number; None: the precision of the prior",
    "rows_at_once": "images per batch, over all devices; fewer need less memory",
    **sections.SAMPLING_KEYS,
}


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.job = "generate"
    config.workdir = "runs/generated"
    config.model_workdir = "runs/prior-shapes"
    config.base = placeholder(str)  # of exported adapters: workdir or export of their base; None: the one they name
    config.step = placeholder(object)  # a number or "best"
    config.seed = 0

    config.prompts = ""
    config.prompts_file = ""
    config.negative = ""
    config.n = 4
    config.clip = placeholder(str)
    config.candidates = 0
    config.upsampler = placeholder(str)
    config.sampling = section(SamplingOptions)
    config.upsampler_sampling = section(SamplingOptions)
    config.rows_at_once = 64
    config.weights = placeholder(str)
    config.mesh = sections.mesh()  # images over all devices; fsdp, tensor: split a prior that one device cannot hold
    return config
