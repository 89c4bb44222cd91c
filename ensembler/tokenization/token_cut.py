"""Count the texts that a tokenizer cuts right behind one of its tokens, so that the token stands in them.

A token may be the beginning of others: behind a space by itself a tokenizer writes digits, and no word. So more texts
begin with its bytes than it stands in.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ensembler.tokenization.token_bytes import TokenBytes
from ensembler.tokenization.token_writer import TokenWriter

_SMALL = 1e-3  # of what is asked about: less is left undecided
_MOST_TRIED = 128  # tokens of one first byte, the most probable ones


class TokenCut:
    """The end of one token of a tokenizer; what follows is asked for in the tokens of another."""

    def __init__(self, writer: TokenWriter, token: int) -> None:
        """`token`: an id of `writer`, which spells text."""
        self.token = token
        self.text = writer.tokens.texts[token]
        self._writer = writer

    def allows(self, token: int) -> bool:
        """Return whether another token of the same tokenizer may stand behind it."""
        return self._writer.can_follow(self.token, token)

    def kept(
        self, tokens: TokenBytes, sums: NDArray[np.float64], first: int, last: int, start: int
    ) -> tuple[float, float]:
        """Return the probability of the tokens that leave the cut where it is, and of those that were not looked at.

        The tokens stand at the places from `first` up to `last` of `tokens` and reach the cut with their first `start`
        bytes; one that ends there is left out. `sums`: the cumulative probabilities, by place.
        """
        small = _SMALL * float(sums[last] - sums[first])
        groups = [
            (float(sums[high] - sums[low]), byte, low, high) for byte, low, high in tokens.by_byte(first, last, start)
        ]
        left = sum(mass for mass, *_ in groups)
        kept = undecided = 0.0
        for mass, byte, low, high in sorted(groups, reverse=True):
            if left <= small:
                break
            left -= mass
            if self._stays_before(byte):
                kept += mass
                continue
            probabilities = np.diff(sums[low : high + 1])
            for place in np.argsort(-probabilities)[:_MOST_TRIED].tolist():
                if mass <= small:
                    break
                mass -= float(probabilities[place])
                if self._writer.cuts_behind(self.text, tokens.spelled[low + place][start:]):
                    kept += float(probabilities[place])
            if mass <= small or self._writer.can_go_on(self.token, bytes([byte])):
                undecided += max(0.0, mass)
        return kept, undecided + max(0.0, left)

    def _stays_before(self, byte: int) -> bool:
        """Return whether the cut is sure to stay before all texts that begin with a byte."""
        if byte >= 0x80 or self._writer.may_join(self.text[-1], byte):
            return False
        return self._writer.cuts_behind(self.text, bytes([byte]))
