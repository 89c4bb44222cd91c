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

from ensembler.decoding.choosing import draw

_DRAFT, _ACCEPT, _REPLACE = range(3)  # draws at one position


class Chooser(Protocol):
    """How tokens are chosen. `rows` are the numbers of the texts, `positions` those of their new tokens."""

    def draft(self, scores: Tensor, rows: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Return a token (n,) from the draft's scores (n, V)."""

    def settle(
        self,
        scores: Tensor,
        draft_scores: Tensor | None,
        drafted: Tensor,
        rows: Sequence[int],
        positions: Sequence[int],
    ) -> Tensor:
        """Return the token (n,) of the ensemble's scores (n, V); where it is the `drafted` one that is accepted.

        `draft_scores` (n, V): from which `drafted` was chosen by `draft`; None for a draft without distribution.
        """


class Greedy:
    """The most probable token of the ensemble."""

    def draft(self, scores: Tensor, rows: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Return the most probable token of the draft."""
        return scores.argmax(-1)

    def settle(
        self,
        scores: Tensor,
        draft_scores: Tensor | None,
        drafted: Tensor,
        rows: Sequence[int],
        positions: Sequence[int],
    ) -> Tensor:
        """Return the most probable token, drafted or not."""
        return scores.argmax(-1)


class Sampling:
    """Draws from the ensemble; `prompts` and `samples` (rows,) int64 say whose noise a row has."""

    def __init__(self, seed: int, prompts: Tensor, samples: Tensor) -> None:
        self._seed = seed
        self._streams = torch.stack([samples, prompts], dim=-1) & 0xFFFFFFFF  # a counter has words of 32 bits

    def draft(self, scores: Tensor, rows: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Return a draw from the draft."""
        return draw(scores, self._seed, self._counters(_DRAFT, rows, positions))

    def settle(
        self,
        scores: Tensor,
        draft_scores: Tensor | None,
        drafted: Tensor,
        rows: Sequence[int],
        positions: Sequence[int],
    ) -> Tensor:
        """Return a draw from the ensemble. Without distribution q, the draw has to hit the drafted token by itself."""
        if draft_scores is None:
            return self.draft(scores, rows, positions)
        drafted = drafted.to(scores.device)
        p, q = _probabilities(scores), _probabilities(draft_scores.to(scores.device))
        chance = (_at(p, drafted) / _at(q, drafted)).nan_to_num(0.0)
        counters = self._counters(_ACCEPT, rows, positions).to(scores.device)
        gumbel = torch_gumbel.noise_at(self._seed, counters, torch.zeros_like(drafted))
        is_kept = gumbel.neg().exp().neg().exp() < chance  # its distribution function makes it uniform
        if is_kept.all():
            return drafted
        left = ~is_kept
        residual = (p[left] - q[left]).clamp(min=0.0)
        residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, p[left])  # p = q up to rounding
        where = left.nonzero().flatten().cpu()
        tokens = drafted.clone()
        tokens[left] = draw(residual.log(), self._seed, self._counters(_REPLACE, rows, positions)[where])
        return tokens

    def _counters(self, purpose: int, rows: Sequence[int], positions: Sequence[int]) -> Tensor:
        places = torch.tensor([3 * position + purpose for position in positions])
        return torch.cat([places[:, None], self._streams[torch.tensor(rows)]], dim=-1)


def _probabilities(scores: Tensor) -> Tensor:
    """softmax(scores) (n, V); zeros where everything is forbidden."""
    return scores.softmax(-1).nan_to_num(0.0)


def _at(values: Tensor, tokens: Tensor) -> Tensor:
    return values.gather(-1, tokens[:, None]).squeeze(-1)
