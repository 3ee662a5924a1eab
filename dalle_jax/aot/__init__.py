"""Compiles trainings and samplers ahead of time for a TPU, and reads what they cost from the program."""
