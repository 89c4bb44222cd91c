"""Byte-pair encoding of a short piece of text, by the merges of a tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import pairwise

Merges = Mapping[tuple[int, int], tuple[int, int]]
"""By two ids that stand side by side: the rank of their merge, lower ones first, and the id that they become."""


@dataclass(frozen=True)
class MergeStep:
    """One merge: its rank, the positions of both symbols in the piece, and the id that then stands at the left one."""

    rank: int
    left: int
    right: int
    merged: int


def merge(symbols: Sequence[int], merges: Merges) -> list[int]:
    """Return the tokens that symbols, as ids, become."""
    ids = list(symbols)
    for step in merge_steps(symbols, merges):
        ids[step.left], ids[step.right] = step.merged, -1
    return [token for token in ids if token >= 0]


def merge_steps(symbols: Sequence[int], merges: Merges) -> Iterator[MergeStep]:
    """Yield the merges of symbols in their order: the pair of lowest rank first, of equal ones the leftmost.

    Source: Sennrich et al. 2016, Neural machine translation of rare words with subword units, section 3.2.
    """
    ids = list(symbols)
    after = [*range(1, len(ids)), -1]  # the next symbol that is still there
    before = [*range(-1, len(ids) - 1)]
    waiting = [
        (found[0], left, found[1], pair)
        for left, pair in enumerate(pairwise(ids))
        if (found := merges.get(pair)) is not None
    ]
    heapify(waiting)
    while waiting:
        rank, left, merged, pair = heappop(waiting)
        right = after[left]
        if right < 0 or (ids[left], ids[right]) != pair:
            continue  # one of them has become part of another
        yield MergeStep(rank, left, right, merged)
        ids[left], ids[right] = merged, -1
        after[left] = after[right]
        if after[left] >= 0:
            before[after[left]] = left
        for one in (before[left], left):
            if one >= 0 and after[one] >= 0:
                new = ids[one], ids[after[one]]
                if (found := merges.get(new)) is not None:
                    heappush(waiting, (found[0], one, found[1], new))
