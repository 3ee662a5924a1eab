"""DALL-E in JAX/Flax, TPU-first: text in, pictures out.

from dalle_jax import TextToImage
images = TextToImage.load("runs/prior-shapes").generate("a red circle above a blue square", n=8, seed=0)
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["TextToImage"]


def __getattr__(name: str) -> Any:  # the import of jax waits until something is used
    if name == "TextToImage":
        from dalle_jax.text_to_image.text_to_image import TextToImage

        return TextToImage
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
