"""Which texts of a grid are on which row: texts that agree so far share one. It knows no tensors of models.

A *stream* is one sample of one prompt; a *track* is the text of one point of the grid for one stream.
"""

from __future__ import annotations

import torch
from torch import Tensor

ENDED = -1


class Tracks:
    """`row_of` (points, streams) int64 on the CPU: the row of each track, ENDED where its text is complete.

    `prompt_of` (streams,) int64: the prompt of each stream; its samples stand next to each other.
    Rows of different prompts never meet; at first there is one row for each prompt.
    """

    def __init__(self, num_points: int, num_prompts: int, num_samples: int) -> None:
        self.prompt_of = torch.arange(num_prompts).repeat_interleave(num_samples)
        self.row_of = self.prompt_of.repeat(num_points, 1)

    @property
    def num_rows(self) -> int:
        """The number of different texts that are not complete."""
        return int(self.row_of.max()) + 1

    def advance(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Give every track its next token (points, streams) and each distinct text a row.

        Returns the row that each new row comes from and its token, both (rows,) int64. New rows are in the order of
        those they come from, so that they stand where they were while nothing splits.
        """
        runs = self.row_of != ENDED
        base = int(tokens[runs].max()) + 1
        texts, self.row_of[runs] = torch.unique(self.row_of[runs] * base + tokens[runs], return_inverse=True)
        return texts // base, texts % base

    def end(self, is_complete: Tensor) -> list[tuple[Tensor, int]]:
        """Take out the rows that are complete, (rows,) bool; the others move up.

        Returns the tracks that end now, (n, 2) points and streams, with the row they were on, row after row.
        """
        ends = [((self.row_of == row).nonzero(), row) for row in is_complete.nonzero().flatten().tolist()]
        moved = torch.cumsum(~is_complete, 0) - 1
        moved[is_complete] = ENDED
        runs = self.row_of != ENDED
        self.row_of[runs] = moved[self.row_of[runs]]
        return ends
