"""Which token comes next, and whether a drafted one is it: greedy, or sampling without a change of the distribution.

The token at a position is a function of the distributions p (the ensemble's) and q (the draft's) there and of the
noise of (seed, prompt, sample, position): y is drawn from q, kept with probability min(1, p(y) / q(y)), else replaced
by a draw from the normalised positive part of p − q (Leviathan et al. 2023, Fast inference from transformers via
speculative decoding; Chen et al. 2023, theorem 1). The drafting members are members of the ensemble, so that q is known
at every position, drafted ahead or not: a text depends neither on how many tokens are drafted nor on the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from ensembler_kernels import torch_gumbel
from torch import Tensor

_DRAFT, _ACCEPT, _REPLACE = range(3)  # what a position has a number for
_AHEAD = 64  # positions whose numbers are made at once: one is hardly cheaper


class Chooser(Protocol):
    """How tokens are chosen. `rows` are the numbers of the texts, `positions` those of their new tokens.

    `needs_draft`: whether a token depends on the draft also where nothing is drafted ahead.
    """

    needs_draft: bool

    def weigh(self, scores: Tensor) -> Tensor:
        """Return from processed scores (n, V) what the other methods take for them."""

    def draft(self, q: Tensor, rows: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Return a token (n,) of the draft."""

    def settle(
        self, p: Tensor, q: Tensor | None, drafted: Tensor, rows: Sequence[int], positions: Sequence[int]
    ) -> Tensor:
        """Return the token (n,) of the ensemble; where it is the `drafted` one that is accepted.

        `drafted` was chosen from `q` by `draft`; None for a draft that has no distribution.
        """


class Greedy:
    """The most probable token of the ensemble."""

    needs_draft = False

    def weigh(self, scores: Tensor) -> Tensor:
        """Scores will do."""
        return scores

    def draft(self, q: Tensor, rows: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Return the most probable token of the draft."""
        return q.argmax(-1)

    def settle(
        self, p: Tensor, q: Tensor | None, drafted: Tensor, rows: Sequence[int], positions: Sequence[int]
    ) -> Tensor:
        """Return the most probable token, drafted or not."""
        return p.argmax(-1)


class Sampling:
    """Draws from the ensemble; `prompts` and `samples` (rows,) int64 say whose noise a row has."""

    needs_draft = True

    def __init__(self, seed: int, prompts: Tensor, samples: Tensor) -> None:
        self._seed = seed
        self._streams = torch.stack([samples, prompts], dim=-1) & 0xFFFFFFFF  # a counter has words of 32 bits
        self._numbers = torch.empty(prompts.shape[0], 0, 3, dtype=torch.float64)

    def weigh(self, scores: Tensor) -> Tensor:
        """Return softmax(scores) (n, V); zeros where everything is forbidden."""
        return scores.softmax(-1).nan_to_num_(0.0)

    def draft(self, q: Tensor, rows: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Return a draw from the draft."""
        return _draw(q, self._uniform(_DRAFT, rows, positions))

    def settle(
        self, p: Tensor, q: Tensor | None, drafted: Tensor, rows: Sequence[int], positions: Sequence[int]
    ) -> Tensor:
        """Return a draw from the ensemble. Without distribution q, the draw has to hit the drafted token by itself."""
        if q is None:
            return self.draft(p, rows, positions)
        drafted = drafted.to(p.device)
        # q(y) is 0 where processors left the draft nothing: then y was no draw, and is never kept.
        chance = (_at(p, drafted).double() / _at(q, drafted)).nan_to_num_(0.0, posinf=0.0)
        is_kept = self._uniform(_ACCEPT, rows, positions).to(p.device) < chance
        if p.device.type == "cpu" and is_kept.all():  # elsewhere the question would cost more than the answer
            return drafted
        residual = (p - q).clamp_(min=0.0)
        residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, p)  # p = q up to rounding
        replaced = _draw(residual, self._uniform(_REPLACE, rows, positions))
        return torch.where(is_kept, drafted, replaced)

    def _uniform(self, purpose: int, rows: Sequence[int], positions: Sequence[int]) -> Tensor:
        """The numbers of a purpose (n,) fp64, each of its own row and position."""
        while max(positions) >= self._numbers.shape[1]:
            self._numbers = torch.cat([self._numbers, self._more()], dim=1)
        if len(rows) == self._numbers.shape[0] and len(set(positions)) == 1:
            return self._numbers[:, positions[0], purpose]  # a slice: no index has to be made
        return self._numbers[rows, positions, purpose]

    def _more(self) -> Tensor:
        """The numbers of the next positions, (rows, _AHEAD, 3)."""
        num_rows, first = self._numbers.shape[:2]
        shape = (num_rows, _AHEAD, 3)
        places = torch.arange(first, first + _AHEAD)[None, :, None].expand(shape)
        purposes = torch.arange(3)[None, None].expand(shape)
        streams = self._streams[:, None, None].expand(*shape, 2)
        counters = torch.cat([torch.stack([purposes, places], dim=-1), streams], dim=-1)
        return torch_gumbel.uniform(self._seed, counters.reshape(-1, 4)).view(shape)


def _draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """The first token (n,) at which the sum of weights (n, V) passes its share `uniform` (n,): one with a weight."""
    sums = weights.cumsum(-1, dtype=torch.float64)
    share = uniform.to(weights.device) * sums[:, -1]
    return torch.searchsorted(sums, share[:, None], right=True).squeeze(-1).clamp_(max=weights.shape[-1] - 1)


def _at(values: Tensor, tokens: Tensor) -> Tensor:
    return values.gather(-1, tokens[:, None]).squeeze(-1)
