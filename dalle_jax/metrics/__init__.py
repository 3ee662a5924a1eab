"""Metrics of images, tokens and captions; pure functions of arrays."""
