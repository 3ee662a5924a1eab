"""Tasks: the models that can be trained, with their losses, their metrics and their data."""
