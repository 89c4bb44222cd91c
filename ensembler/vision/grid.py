"""Class logits at all α of a rule, from one set of member logits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from ensembler_kernels import combine
from torch import Tensor

from ensembler.decoding.points import RulePoints


def combine_points(logits: Mapping[str, Tensor], points: RulePoints) -> Tensor:
    """Return combined logits (K, rows, C) fp32 of the K points of a rule; `logits` (rows, C) of every member by role.

    One call of the operation for all α, each the same arithmetic as alone: bit for bit what the ensemble computes at
    that α. Members' logits are not copied.
    """
    ordered = [logits[role].unsqueeze(0).expand(len(points.alphas), -1, -1) for role in points.roles]
    return combine(ordered, points.how, torch.tensor(points.alphas, device=ordered[0].device))
