"""`cub_captions`: CUB-200-2011 with ten captions per image, from a local copy. Importing this package registers it."""

from dalle_jax.data.builders.cub_captions.cub_captions_dataset_builder import Builder, CubConfig

__all__ = ["Builder", "CubConfig"]
