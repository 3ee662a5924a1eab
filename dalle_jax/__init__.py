"""DALL-E in JAX and Flax: draws images from captions, on CPUs, GPUs and TPUs.

from dalle_jax import TextToImage
images = TextToImage.load("runs/prior-shapes").generate("a red circle above a blue square", n=8, seed=0)

Public names:
  TextToImage: a trained prior; draws images for captions and edits images.
  ClipScorer: a trained or imported CLIP; scores images against captions.
  show, save: show images in a notebook or a viewer; write them as files.
  train: trains what a configuration describes, after the image tokenizer that it needs.
"""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["ClipScorer", "TextToImage", "save", "show", "train"]

_PLACES = {
    "ClipScorer": ("dalle_jax.text_to_image.clip_scorer", "ClipScorer"),
    "TextToImage": ("dalle_jax.text_to_image.text_to_image", "TextToImage"),
    "save": ("dalle_jax.text_to_image.showing", "save"),
    "show": ("dalle_jax.text_to_image.showing", "show"),
    "train": ("dalle_jax.jobs.train", "run"),
}


def __getattr__(name: str) -> Any:  # so that jax is imported only when a name is used
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PLACES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
