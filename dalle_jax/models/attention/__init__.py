"""Attention patterns, their implementations and their decode caches."""
