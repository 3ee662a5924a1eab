"""A look at a data set without training: what it holds, what is left out, and what the model will see.

    python -m dalle_jax.main --config=configs/data.py --config.data.path=DIR

It logs about ten lines. `runs/data/data.json` has all numbers, and `runs/data/samples/data.png` shows some images with
their captions. Every training begins with the same look.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from dalle_jax.configuration import sections
from dalle_jax.configuration.config_files import choose
from dalle_jax.configuration.sections import section
from dalle_jax.data.sources.source import DataOptions

VARIANTS = {
    "folder": dict(doc="your own images or tar shards (data.path); a CPU, seconds", data=sections.OWN),
    "tar_shards": dict(
        doc="your own tar shards (data.path), which are indexed first; a CPU, minutes",
        data=dict(sections.TAR_SHARDS, image_size=32),
    ),
    "shapes": dict(doc="drawn shapes; a CPU, seconds", data=sections.SHAPES),
    "emoji": dict(doc="the emoji of an installed font; a CPU, seconds", data=sections.EMOJI),
    "coco": dict(doc="MS-COCO, which is copied first; a CPU, minutes", data=sections.COCO),
    "cub": dict(doc="CUB-200-2011, which is copied first; a CPU, minutes", data=sections.CUB),
}

KEYS = {
    "workdir": "directory of the results",
    "data.path": "your images and captions, or your copy of the data set",
    "data.source": "auto (the files decide), folder, tar_shards, shapes_captions, …, or a TFDS name",
    "data.image_size": "height and width of the images as the model sees them, in pixels",
    "data.caption_lines": "which lines of a caption's text file are captions: all or first",
    "data.caption_from": "files; or make captions from file_names, folder_names or paths (both)",
    "data.caption_key": "key or column of the captions",
    "text.length": "number of text positions; None: none is cut",
    "text.vocab_size": "size of the text vocabulary; None: one for all letters",
    "text.path": "text model that counts tokens; None: one is trained for this look",
}

# Nothing is trained here.
_OF_TRAINING = ("augment", "cache", "cache_bytes", "workers", "bpe_dropout", "condition")


def get_config(variant: str | None = None) -> ConfigDict:
    variant, row = choose(VARIANTS, variant, __file__)

    config = ConfigDict()
    config.job = "data"
    config.variant = variant
    config.workdir = "runs/data"

    data = {key: value for key, value in row["data"].items() if key not in _OF_TRAINING}
    config.data = section(DataOptions, without=_OF_TRAINING, **data)
    config.text = ConfigDict({"length": placeholder(int), "vocab_size": placeholder(int), "path": placeholder(str)})
    return config
