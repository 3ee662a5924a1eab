"""Draws images for captions with a trained prior, edits them, and ranks them with CLIP."""
