"""Data: sources, TFDS builders, the grain pipeline, augmentation and the text model."""
