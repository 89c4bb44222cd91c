"""The bytes of the tokens of a vocabulary, sorted, so that all tokens that begin with given bytes are one range."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from functools import lru_cache

import numpy as np


class TokenBytes:
    """The tokens that spell text, no two of them the same.

    `spelled`: their bytes in order; `order` (num_tokens,) int64: their ids in that order; `longest`: the number of
    bytes of the longest.
    """

    def __init__(self, texts: Mapping[int, bytes]) -> None:
        """`texts`: the bytes of each token by its id; none is empty."""
        self.texts = dict(texts)
        ordered = sorted(self.texts.items(), key=lambda one: one[1])
        self.spelled = [spelled for _, spelled in ordered]
        self.order = np.array([token for token, _ in ordered], dtype=np.int64)
        self.places = {spelled: place for place, spelled in enumerate(self.spelled)}
        self.longest = max(map(len, self.spelled), default=0)
        self.starting = lru_cache(maxsize=1 << 16)(self._starting)
        self.within = lru_cache(maxsize=1 << 16)(self._within)
        self.by_byte = lru_cache(maxsize=1 << 16)(self._by_byte)

    def __len__(self) -> int:
        return len(self.spelled)

    def _starting(self, start: bytes) -> tuple[int, int]:
        """Return the range of places of the tokens that begin with `start`: the first, and one behind the last."""
        if len(start) > self.longest:
            return 0, 0
        first = bisect_left(self.spelled, start)
        return first, bisect_left(self.spelled, True, lo=first, key=lambda one: not one.startswith(start))

    def _within(self, text: bytes) -> tuple[int, ...]:
        """Return the places of the tokens with which `text` begins, the shortest first; one may be all of it."""
        found = (self.places.get(text[:end]) for end in range(1, min(len(text), self.longest) + 1))
        return tuple(place for place in found if place is not None)

    def _by_byte(self, first: int, last: int, start: int) -> tuple[tuple[int, int, int], ...]:
        """Return the tokens of a range, which agree in `start` bytes, by their next byte, where they have one.

        Each entry is a byte, the first place, and one behind the last.
        """
        found = []
        while first < last:
            spelled = self.spelled[first]
            if len(spelled) == start:  # at most the first one
                first += 1
                continue
            byte = spelled[start]
            high = bisect_left(self.spelled, byte + 1, lo=first, hi=last, key=lambda one: one[start])
            found.append((byte, first, high))
            first = high
        return tuple(found)

    def id_of(self, spelled: bytes) -> int | None:
        """Return the id of the token that spells exactly these bytes, or None."""
        place = self.places.get(spelled)
        return None if place is None else int(self.order[place])
