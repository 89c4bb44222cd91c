"""The three operations by CUDA C++ kernels, for machines without Triton; see `ops` for what they take."""

from ensembler_kernels.cuda.ops import combine, combine_logprob, combine_sample, unavailable

__all__ = ["combine", "combine_logprob", "combine_sample", "unavailable"]
