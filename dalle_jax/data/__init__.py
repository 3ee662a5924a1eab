"""Data: the TFDS builders, other sources, the grain pipeline, augmentations and the text model."""
