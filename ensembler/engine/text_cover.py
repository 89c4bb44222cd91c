"""The probability that a text begins with given bytes, as a sum over the ways to write them in tokens.

Counted may be only those texts that another tokenizer cuts right behind the bytes.

From a node, which has read some tokens, the bytes r that remain are covered by

    the tokens that begin with r: one range of the vocabulary, sorted by bytes, and
    every token v that r begins with, followed by what covers the rest from the node behind v.

A node that was not evaluated leaves its probability *open*: the value lies in [low, low + open]. Where a cut is wanted,
the first token that goes beyond it tells: a path that ends at the cut needs the node behind it, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ensembler.tokenization.token_bytes import TokenBytes
from ensembler.tokenization.token_cut import TokenCut

_SHARP = 1e-6  # the difference of two sums of about 1 is rounding below 1e-16
Path = tuple[int, ...]
"""Token ids behind the tokens that a text is known to begin with."""


class Neighbours(Protocol):
    """The tokens that a tokenizer may write one behind the other: a `TokenWriter` knows them."""

    def can_follow(self, first: int, second: int) -> bool:
        """Return whether the token `second` may stand behind `first`, both as ids."""

    def can_go_on(self, token: int, text: bytes) -> bool:
        """Return whether tokens that together begin with `text` may stand behind a token."""


@dataclass(frozen=True, eq=False)
class NextTokens:
    """The distribution behind some tokens, in the order of their bytes.

    `log_probs` (num_tokens,) float32; `sums` (num_tokens + 1,) float64, the cumulative probabilities; `end`, the
    probability that the text ends.
    """

    log_probs: NDArray[np.float32]
    sums: NDArray[np.float64]
    end: float
    _kept: dict[tuple[bytes, int, int], tuple[float, float]] = field(default_factory=dict)

    def kept(self, cut: TokenCut, tokens: TokenBytes, first: int, last: int, start: int) -> tuple[float, float]:
        """Return `cut.kept` of these probabilities, which is computed once."""
        key = cut.text, first, start
        if key not in self._kept:
            self._kept[key] = cut.kept(tokens, self.sums, first, last, start)
        return self._kept[key]

    def within(self, first: int, last: int) -> float:
        """Return the probability of the tokens at places from `first` up to `last`."""
        found = float(self.sums[last] - self.sums[first])
        if found > _SHARP:
            return found
        return float(np.exp(self.log_probs[first:last], dtype=np.float64).sum())


@dataclass
class Bounds:
    """A probability between `low` and `low` plus all that is open.

    `open`: by the node that would have to be evaluated; `undecided`: what no node would tell.
    """

    low: float = 0.0
    open: dict[Path, float] = field(default_factory=dict)
    undecided: float = 0.0

    @property
    def num_open(self) -> float:
        """The mass that is open."""
        return sum(self.open.values()) + self.undecided

    @property
    def high(self) -> float:
        """The upper bound."""
        return self.low + self.num_open

    @property
    def middle(self) -> float:
        """The value that is taken: the middle of the interval."""
        return self.low + self.num_open / 2

    @property
    def log_error(self) -> float:
        """The largest error of the middle's logarithm."""
        return math.log(self.middle / self.low) if self.low > 0 else math.inf if self.num_open else 0.0


def cover(
    nodes: Mapping[Path, NextTokens],
    tokens: TokenBytes,
    writer: Neighbours,
    text: bytes,
    *,
    ends: bool = False,
    cut: TokenCut | None = None,
    longer: Sequence[bytes] | None = None,
) -> Bounds:
    """Return the bounds of the probability that the text goes on with `text`; with `ends`, that it ends behind it.

    `nodes`: those that were evaluated, by path from the first, (). `cut`: of these texts, those that another tokenizer
    cuts behind `text`; `longer`: what it would have to go on with to be cut otherwise, so that a path behind which none
    of these may stand counts wholly; None where anything may tell.
    """
    bounds = Bounds()
    waiting: list[tuple[Path, bytes, float]] = [((), text, 1.0)]
    while waiting:
        path, rest, mass = waiting.pop()
        if not rest and not ends and (cut is None or _is_settled(writer, path, longer)):
            bounds.low += mass
            continue
        node = nodes.get(path)
        if node is None:
            bounds.open[path] = bounds.open.get(path, 0.0) + mass
            continue
        if not rest and ends:
            bounds.low += mass * node.end
            continue
        if not ends:
            first, last = tokens.starting(rest)
            if cut is None:
                bounds.low += mass * node.within(first, last)
            else:
                kept, undecided = node.kept(cut, tokens, first, last, len(rest))
                bounds.low += mass * (kept if rest else kept + node.end)
                bounds.undecided += mass * undecided
        for place in tokens.within(rest):
            token, behind = int(tokens.order[place]), rest[len(tokens.spelled[place]) :]
            if not behind and not ends and cut is None:  # one of the range
                continue
            if path and not writer.can_follow(path[-1], token):
                continue
            probability = node.within(place, place + 1)
            if probability > 0 and (not behind or writer.can_go_on(token, behind)):
                waiting.append(((*path, token), behind, mass * probability))
    return bounds


def ceiling(nodes: Mapping[Path, NextTokens], tokens: TokenBytes, text: bytes, *, ends: bool = False) -> Bounds:
    """Return wide bounds that cost little, from 0 on: what any neighbours might write, wherever it is cut."""
    return Bounds(undecided=cover(nodes, tokens, _AnyNeighbours(), text, ends=ends).high)


class _AnyNeighbours:
    def can_follow(self, first: int, second: int) -> bool:
        return True

    def can_go_on(self, token: int, text: bytes) -> bool:
        return True


def _is_settled(writer: Neighbours, path: Path, longer: Sequence[bytes] | None) -> bool:
    return longer is not None and bool(path) and not any(writer.can_go_on(path[-1], one) for one in longer)
