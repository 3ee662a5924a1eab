"""A trained CLIP: how it is stored, and what other models use it for."""
