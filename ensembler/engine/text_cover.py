"""The probability that a text begins with given bytes, as a sum over the ways to write them in tokens.

From a node, which has read some tokens, the bytes r that remain are covered by

    the tokens that begin with r: one range of the vocabulary, sorted by bytes, and
    every token v that r begins with, followed by what covers the rest from the node behind v.

A node that was not evaluated leaves its probability *open*: the value lies in [low, low + open].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ensembler.tokenization.token_bytes import TokenBytes

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
    """The distribution behind some tokens: `sums` (num_tokens + 1,) float64, the cumulative probabilities in the order
    of their bytes; `end`, the probability that the text ends.

    In float32 the difference of two neighbouring sums would be mostly rounding.
    """

    sums: NDArray[np.float64]
    end: float

    def within(self, first: int, last: int) -> float:
        """Return the probability of the tokens at places from `first` up to `last`."""
        return float(self.sums[last] - self.sums[first])


@dataclass
class Bounds:
    """A probability between `low` and `low` plus all that is `open`, by the node that would have to be evaluated."""

    low: float = 0.0
    open: dict[Path, float] = field(default_factory=dict)

    @property
    def num_open(self) -> float:
        """The mass that is open."""
        return sum(self.open.values())

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
        return math.log(self.middle / self.low) if self.low > 0 else math.inf if self.open else 0.0


def cover(
    nodes: Mapping[Path, NextTokens], tokens: TokenBytes, writer: Neighbours, text: bytes, *, ends: bool = False
) -> Bounds:
    """Return the bounds of the probability that the text goes on with `text`; with `ends`, that it ends behind it.

    `nodes`: those that were evaluated, by path from the first, ().
    """
    bounds = Bounds()
    waiting: list[tuple[Path, bytes, float]] = [((), text, 1.0)]
    while waiting:
        path, rest, mass = waiting.pop()
        if not rest and not ends:
            bounds.low += mass
            continue
        node = nodes.get(path)
        if node is None:
            bounds.open[path] = bounds.open.get(path, 0.0) + mass
            continue
        if not rest:
            bounds.low += mass * node.end
            continue
        if not ends:
            bounds.low += mass * node.within(*tokens.starting(rest))
        for place in tokens.within(rest):
            token, behind = int(tokens.order[place]), rest[len(tokens.spelled[place]) :]
            if not behind and not ends:  # one of the range
                continue
            if path and not writer.can_follow(path[-1], token):
                continue
            probability = node.within(place, place + 1)
            if probability > 0 and (not behind or writer.can_go_on(token, behind)):
                waiting.append(((*path, token), behind, mass * probability))
    return bounds
