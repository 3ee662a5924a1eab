"""Priors over text and image tokens."""
