"""Evaluation: how probable given texts are under an ensemble, for many α at once."""
