"""Combination of the next-token logits of several language models: three operations, several implementations."""

from ensembler_kernels.combination import Combination
from ensembler_kernels.dispatch import combine, combine_logprob, combine_sample

__all__ = ["Combination", "combine", "combine_logprob", "combine_sample"]
