"""`emoji_captions`: a TFDS data set of a font's colour emoji with captions. Importing this package registers it."""

from dalle_jax.data.builders.emoji_captions.emoji_captions_dataset_builder import Builder, EmojiConfig

__all__ = ["Builder", "EmojiConfig"]
