"""Metrics, progress, images and tables that people read."""
