"""Checkpoints, frozen modules, and the other files of a workdir."""
