"""DALL-E in JAX and Flax: draws images from captions, on CPUs, GPUs and TPUs.

from dalle_jax import TextToImage
images = TextToImage.load("runs/prior-shapes").generate("a red circle above a blue square", n=8, seed=0)
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["TextToImage"]


def __getattr__(name: str) -> Any:  # jax is imported on first use only
    if name == "TextToImage":
        from dalle_jax.text_to_image.text_to_image import TextToImage

        return TextToImage
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
