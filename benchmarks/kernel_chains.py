"""The chain that people write for base-change and proxy-tuning: what the operations are measured against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def log_softmax_chain(members: Sequence[Tensor], alpha: float) -> Tensor:
    """Return the combined scores: three log_softmax, combine."""
    anchor, up, down = (z.float().log_softmax(-1) for z in members)
    return anchor + alpha * (up - down)


def greedy_chain(members: Sequence[Tensor], alpha: float) -> tuple[Tensor, Tensor]:
    """Return the greedy tokens and all probabilities: three log_softmax, combine, softmax, argmax."""
    probabilities = log_softmax_chain(members, alpha).softmax(-1)
    return probabilities.argmax(-1), probabilities


def multinomial_chain(members: Sequence[Tensor], alpha: float, temperature: float) -> Tensor:
    """Return sampled tokens: the same chain, with a draw at its end."""
    probabilities = (log_softmax_chain(members, alpha) / temperature).softmax(-1)
    return torch.multinomial(probabilities, 1)


def scoring_chain(members: Sequence[Tensor], alphas: Sequence[float], targets: Tensor) -> Tensor:
    """Return the log-probs of the targets (K, rows): the members' log_softmax once, then a log_softmax per α."""
    anchor, up, down = (z.float().log_softmax(-1) for z in members)
    ratio, at = up - down, targets.unsqueeze(-1)
    return torch.stack([(anchor + alpha * ratio).log_softmax(-1).gather(-1, at).squeeze(-1) for alpha in alphas])
