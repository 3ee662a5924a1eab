"""Measures trained models and writes the report."""
