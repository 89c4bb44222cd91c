"""The chain that people write for base-change and proxy-tuning: what the operations are measured against."""

from __future__ import annotations

import torch
from torch import Tensor


def log_softmax_chain(members: list[Tensor], alpha: float) -> tuple[Tensor, Tensor]:
    """Return the greedy tokens and all probabilities: three log_softmax, combine, softmax, argmax."""
    anchor, up, down = (z.float().log_softmax(-1) for z in members)
    probabilities = (anchor + alpha * (up - down)).softmax(-1)
    return probabilities.argmax(-1), probabilities


def multinomial_chain(members: list[Tensor], alpha: float, temperature: float) -> Tensor:
    """Return sampled tokens: the same chain, with a draw at its end."""
    anchor, up, down = (z.float().log_softmax(-1) for z in members)
    probabilities = ((anchor + alpha * (up - down)) / temperature).softmax(-1)
    return torch.multinomial(probabilities, 1)
