"""Checkpoints, frozen modules, and what else a run directory holds."""
