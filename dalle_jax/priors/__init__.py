"""Priors over (text, image) tokens: their models, losses and samplers."""
