"""Exports trained models as safetensors and JSON with a model card, and pushes them to a hub."""
