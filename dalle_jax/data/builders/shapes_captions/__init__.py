"""`shapes_captions`: a TFDS data set of coloured shapes with captions. Importing this package registers it."""

from dalle_jax.data.builders.shapes_captions.scenes import Object, Scene
from dalle_jax.data.builders.shapes_captions.shapes_captions_dataset_builder import Builder, ShapesConfig

__all__ = ["Builder", "Object", "Scene", "ShapesConfig"]
