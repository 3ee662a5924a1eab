"""Encodes the images of a split to tokens once. Trainings of priors then read the tokens and decode no image.

    python -m dalle_jax.main --config=configs/encode.py --config.tokenizer_workdir=RUN --config.data.path=DIR \
        --workdir=OUT
    python -m dalle_jax.main --config=configs/prior.py:small --config.data.path=DIR --config.data_tokens=OUT

A run that was stopped or killed resumes: the same command encodes the parts that are missing or damaged. Each part
holds 4,096 examples. Several hosts share the parts. OUT also holds a copy of the image tokenizer, which the training
uses by default.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from dalle_jax.configuration import sections
from dalle_jax.configuration.config_files import choose
from dalle_jax.configuration.sections import section
from dalle_jax.data.sources.source import DataOptions

VARIANTS = {
    "folder": dict(doc="your own images or tar shards (data.path); one GPU, not yet measured", data=sections.OWN),
    "tar_shards": dict(
        doc="your own tar shards (data.path), which are indexed first; one GPU, not yet measured",
        data=sections.TAR_SHARDS,
    ),
    "shapes": dict(doc="drawn shapes; a CPU, not yet measured", data=sections.SHAPES),
    "emoji": dict(doc="the emoji of an installed font; a CPU, not yet measured", data=sections.EMOJI),
    "coco": dict(doc="MS-COCO; one GPU, not yet measured", data=sections.COCO),
    "cub": dict(doc="CUB-200-2011; one GPU, not yet measured", data=sections.CUB),
}

KEYS = {
    "workdir": "folder of the tokens",
    "tokenizer_workdir": "workdir of the image tokenizer, or a folder that an importer wrote",
    "tokenizer_step": "its checkpoint; None: the best or latest",
    "data.path": "your images, or your copy of the data set",
    "data.source": "auto (the files decide), folder, tar_shards, shapes_captions, …, or a TFDS name",
    "data.image_size": "height and width of the images in pixels; None: as the tokenizer was trained",
    "data.train_split": "the split to encode",
    "data.workers": "processes that read and decode images; None: one for each core; 0: two threads",
}

# Nothing is trained here, and no caption is read.
_OF_TRAINING = ("augment", "cache", "cache_bytes", "bpe_dropout")


def get_config(variant: str | None = None) -> ConfigDict:
    variant, row = choose(VARIANTS, variant, __file__)

    config = ConfigDict()
    config.job = "encode"
    config.variant = variant
    config.workdir = "runs/encoded"
    config.tokenizer_workdir = placeholder(str)
    config.tokenizer_step = placeholder(int)

    data = {key: value for key, value in row["data"].items() if key not in (*_OF_TRAINING, "image_size")}
    data = {**data, "workers": None}
    config.data = section(DataOptions, without=(*_OF_TRAINING, "image_size"), **data)
    config.data.image_size = placeholder(int)
    return config
