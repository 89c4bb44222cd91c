"""Schemes of quantised checkpoints: a file for each family of schemes, and one that finds them in a model."""
