"""TFDS builders: embedded data sets and data sets made from your own files."""
