"""`coco_captions_local`: MS-COCO's captions from a local copy. Importing this package registers it with TFDS."""

from dalle_jax.data.builders.coco_captions_local.coco_captions_local_dataset_builder import Builder, CocoConfig

__all__ = ["Builder", "CocoConfig"]
