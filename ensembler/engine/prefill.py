"""Read texts into rows of a cache: pieces of bounded length, the logits behind their ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ensembler.engine.model_runner import ModelRunner, Step
from ensembler.engine.row_cache import RowCache

Logits = dict[str, Tensor]
RunMembers = Callable[[Step, RowCache, Sequence[ModelRunner] | None], Logits]
"""Runs all members, or those of the given runners, and returns their logits (rows, n, V) by role."""


class Place(NamedTuple):
    """Logits that are wanted: their row and column, and the text behind which they stand, prompt first."""

    row: int
    column: int
    ids: Sequence[int]
    num_prompt: int


Complete = Callable[[Logits, Sequence[Place]], Logits]
"""Adds the logits of members that are asked for text, at the places where they are wanted."""
_CHUNK = 1024  # positions of prompts that are read at once: a mask of all of a long prompt would be its square


def prefill(
    run: RunMembers,
    cache: RowCache,
    ids: Tensor,
    positions: Tensor,
    chunk: int | None = None,
    first_row: int = 0,
    num_kept: int = 1,
) -> Logits:
    """Read prompts, `ids` and `positions` (rows, n), `chunk` of them at a time; return the last `num_kept` logits.

    Those are (rows, num_kept, V) by role; the last chunk is as long as they need.
    """
    lengths = positions[:, -1:] + 1  # of the prompts, whatever the pieces
    for start, stop in pairwise([*range(0, ids.shape[1] - num_kept + 1, chunk or _CHUNK), ids.shape[1]]):
        here = slice(start, stop)
        logits = run(Step(ids[:, here], None, positions[:, here], num_kept, first_row, lengths), cache, None)
    return logits


def unread_to_the_right(texts: Sequence[Sequence[int]], num_read: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return ids and positions (rows, n) int64 of what is unread of `texts`: all end at the right, −1 is padding."""
    unread = [list(ids[num:]) for ids, num in zip(texts, num_read, strict=True)]
    longest = max(map(len, unread))
    ids = torch.tensor([[0] * (longest - len(one)) + one for one in unread])
    positions = torch.tensor([len(text) for text in texts])[:, None] - longest + torch.arange(longest)
    positions[positions < torch.tensor(num_read)[:, None]] = -1
    return ids, positions
