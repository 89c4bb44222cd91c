"""Combination of the next-token logits of several language models: three operations, several implementations."""

from ensembler_kernels.combination import Combination
from ensembler_kernels.dispatch import combine, combine_logprob, combine_sample, make_noise
from ensembler_kernels.results import Sampled, Scored, check_sampled, check_scored
from ensembler_kernels.weights import Weights

__all__ = [
    "Combination",
    "Sampled",
    "Scored",
    "Weights",
    "check_sampled",
    "check_scored",
    "combine",
    "combine_logprob",
    "combine_sample",
    "make_noise",
]
