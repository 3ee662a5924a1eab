"""Compiles trainings and samplers ahead of time for TPUs, and reads memory, work and time from the programs."""
