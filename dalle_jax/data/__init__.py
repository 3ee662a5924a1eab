"""Data: the two embedded TFDS builders, other sources, the grain pipeline, augmentations and the text model."""
