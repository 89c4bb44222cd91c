"""Combine logits on each rank's part of the vocabulary, before the parts are gathered. It knows nothing of vLLM.

Rules are affine: what an id gets depends on the members' logits of that id, and on no other, but for cut-offs and for
members that are normalised over the shared ids. So one combined row is gathered instead of one of each member: 4 bytes
for an id instead of those of every member, 2 each in half precision. Results are those of whole rows to the bit; on a
CPU to a rounding, where weights are neither 0 nor ±1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from ensembler_kernels import Weights, combine
from torch import Tensor


def has_nan(logits: Tensor) -> Tensor:
    """Return which rows of logits (n, V) hold NaN, (n,) bool: one reading, where isnan() would write as much again."""
    return logits.amax(-1).isnan()


def can_combine_shards(weights: Weights, widths: Sequence[int]) -> bool:
    """Return whether each id's result depends on that id alone, for members with `widths` ids.

    Not with a cut-off, nor where ids that not all members hold are neutral.
    """
    return not weights.cuts and weights.held_width(widths) <= weights.shared_width(widths)


@dataclass(frozen=True)
class VocabShards:
    """A vocabulary cut into shards of `size` ids: rank r has those from r · size on.

    `weights`: the rules, whose rows do not count; `widths`: the number of ids of each member, in the order of the
    weights. Raises ValueError where a row cannot be combined in parts.
    """

    weights: Weights
    widths: tuple[int, ...]
    size: int

    def __post_init__(self) -> None:
        if not can_combine_shards(self.weights, self.widths):
            raise ValueError("expected rules without a cut-off, and ids of few members that are forbidden, not neutral")

    def combine(self, rank: int, logits: Sequence[Tensor], table: Tensor) -> Tensor:
        """Return a rank's part of the result, (n, size + members) fp32, for `join`.

        Combined logits of the rank's ids, −inf behind the last; then for each member 1 where one of its logits is NaN,
        else 0. `logits`: (n, size) per member, of which ids behind the member's width are not read. `table` (n,
        2 · members + 2): rows of the weights. Raises ValueError for logits of another number of ids.
        """
        for z in logits:
            if z.shape[-1] != self.size:
                raise ValueError(f"expected logits of a shard of {self.size} ids, got {z.shape[-1]}")
        part = torch.full((len(table), self.size + len(logits)), -math.inf, device=table.device)
        num = self._num_below(self._held, rank)
        if num:
            weights = replace(self._shared_weights, table=table, rule_runs=None)
            part[:, :num] = combine([z[:, :num] for z in logits], weights)
        for flag, z, width in zip(part[:, self.size :].unbind(1), logits, self.widths, strict=True):
            num = self._num_below(width, rank)
            flag.copy_(has_nan(z[:, :num]) if num else z.new_zeros(len(z)))
        return part

    def join(self, parts: Tensor) -> tuple[Tensor, Tensor]:
        """Return combined logits (n, V) fp32, and which members have NaN among their logits, (n, members) bool.

        `parts` (ranks, n, size + members): those of all ranks in their order.
        """
        logits, flags = parts[..., : self.size], parts[..., self.size :]
        combined = logits.transpose(0, 1).flatten(1)[:, : self.weights.width(self.widths)]
        return combined, (flags != 0).any(0)

    @cached_property
    def _held(self) -> int:
        return self.weights.held_width(self.widths)

    @cached_property
    def _shared_weights(self) -> Weights:
        """Weights for members that all hold the same ids, as they do where any may be permitted."""
        return replace(self.weights, shared=None, neutral=False, known={})

    def _num_below(self, end: int, rank: int) -> int:
        """Return how many ids of a rank's shard are below `end`."""
        return min(max(end - rank * self.size, 0), self.size)
