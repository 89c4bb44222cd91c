"""Combination of the next-token logits of several language models."""

from ensembler_kernels.reference import combine

__all__ = ["combine"]
