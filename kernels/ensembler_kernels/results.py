"""Results of the operations. Errors are values in it, which `check_sampled` and `check_scored` turn into messages."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Sampled(NamedTuple):
    """Of every output: its token (outputs,) int64, −1 where it has none; the token's log-prob fp32, NaN for NaN."""

    tokens: Tensor
    logprobs: Tensor


class Scored(NamedTuple):
    """Of K points and n targets, each (K, n): log-prob fp32, NaN where there is none; if it is the argmax; log Z."""

    logprobs: Tensor
    greedy: Tensor
    log_z: Tensor | None


def check_sampled(sampled: Sampled) -> None:
    """Raise ValueError naming the first output that has no token to give. Waits for the device."""
    bad = (sampled.tokens < 0) | sampled.logprobs.isnan()
    if bad.any():
        output = int(bad.nonzero()[0])
        no_token = sampled.tokens[output] < 0
        what = "has no token to choose: all its combined logits are -inf" if no_token else "holds NaN"
        raise ValueError(f"output {output} {what}; look at the members' logits in the row that it reads")


def check_scored(scored: Scored, alphas: Tensor) -> None:
    """Raise ValueError naming the first target that has no log-prob; `alphas` (K,). Waits for the device."""
    bad = scored.logprobs.isnan()
    if bad.any():
        k, target = bad.nonzero()[0].tolist()
        what = "all combined logits of the row that it reads are -inf, or one of them is NaN"
        raise ValueError(f"target {target} has no log-prob at point {k} (alpha {alphas[k]:g}): {what}")
