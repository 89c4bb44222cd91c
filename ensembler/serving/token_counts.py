"""Count the tokens of every point, and those that α changed, on the device of a model. It knows nothing of vLLM.

The number of a point travels with each token to where logits are computed: nothing waits for the device meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from ensembler_kernels import Weights
from torch import Tensor

from ensembler.engine.grid import GridPoint

MOST_POINTS = 255
OTHER = "other"
NUM_COLUMNS = 2
"""Numbers of a request beside its weights: that of its point, and the position from which on tokens count."""

PointCount = tuple[str, str, int, int]
"""Rule, α as text of six digits, tokens, and how many of them α changed."""


class TokenCounts:
    """Tokens and changed tokens by the number of their point: from 1, those of `first` and others as they arrive.

    0 is the number of none. Requests at points behind the first `MOST_POINTS` are counted together, as rule and α
    "other".
    """

    def __init__(self, device: torch.device | str, first: Sequence[GridPoint] = ()) -> None:
        self._numbers: dict[tuple[str, str], int] = {}
        self._counts = torch.zeros(MOST_POINTS + 2, 2, dtype=torch.int64, device=device)
        self.is_due = False  # whether the next logits are those to sample from
        for point in first:
            self.number_of(point)

    def number_of(self, point: GridPoint) -> int:
        """Return the number of a point, a new one where it was not seen before."""
        label = (point.rule, f"{point.alpha + 0.0:g}")  # -0 is 0
        if label not in self._numbers and len(self._numbers) >= MOST_POINTS:
            label = (OTHER, OTHER)
        return self._numbers.setdefault(label, len(self._numbers) + 1)

    def begin_step(self) -> None:
        """Count the next logits: the first of a step are those to sample from, later ones are log-probs of prompts."""
        self.is_due = True

    def add(self, numbers: Tensor, combined: Tensor, anchor: Tensor, has_failed: Tensor) -> None:
        """Count rows (n, V) of combined logits, by the numbers (n,) of their points; wait for nothing.

        A row is changed where its most probable token is not that of `anchor` (n, V). It is not where `has_failed`
        (n,) bool. Call it where `is_due` alone: once in a step.
        """
        self.is_due = False
        is_changed = (combined.argmax(-1) != anchor.argmax(-1)) & ~has_failed
        counted = torch.stack([torch.ones_like(is_changed), is_changed], 1)
        self._counts.index_add_(0, numbers.long(), counted.to(self._counts.dtype))

    def read(self) -> list[PointCount]:
        """Return the counts of all points that were asked for, in the order of their numbers; wait for the device."""
        counts = self._counts.tolist()
        return [(*label, *counts[number]) for label, number in self._numbers.items()]


def number_tokens(rows: Tensor, positions: Tensor) -> Tensor:
    """Return weights with one more column, the number of the point where a token counts, else 0: (tokens, C + 1).

    `rows` (tokens, C + 2): weights of each token's request, the number of its point, and the position of the first
    token that counts; `positions` (tokens,).
    """
    is_counted = positions >= rows[:, -1]
    return torch.cat([rows[:, :-NUM_COLUMNS], (rows[:, -2] * is_counted).unsqueeze(1)], 1)


def at_anchor(weights: Weights) -> Weights:
    """Return the weights of the same rules at α = 0."""
    table = weights.table.clone()
    table[:, 2 * weights.num_members] = 0.0
    return weights.replace_table(table)
