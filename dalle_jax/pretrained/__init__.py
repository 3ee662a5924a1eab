"""Converts published weights to our parameters without running code from their files."""
