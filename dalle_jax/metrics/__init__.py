"""Metrics: what pictures, tokens and captions are judged by; pure functions of arrays."""
