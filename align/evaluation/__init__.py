"""Comparing models on the same prompts and noise."""
