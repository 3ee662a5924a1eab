"""`tar_shards`: a TFDS data set of a user's image–caption tar shards. Importing this package registers it."""

from dalle_jax.data.builders.tar_shards.tar_shards_dataset_builder import Builder, TarShardsConfig

__all__ = ["Builder", "TarShardsConfig"]
