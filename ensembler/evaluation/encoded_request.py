"""A request of lm-eval as token ids of the members."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class EncodedRequest(NamedTuple):
    """A request as the members read it: the `tokens` of its context and its continuation, or of a prompt alone.

    `is_cut`: it lost tokens on the left to fit into the context. `num_new`: how many tokens may be generated.
    `others`: by role, the ids of the context for members with other tokenizers, where it is a chat.
    """

    tokens: tuple[tuple[int, ...], ...]
    is_cut: bool
    num_new: int
    others: Mapping[str, list[int]]

    @classmethod
    def fitted(
        cls, tokens: Sequence[tuple[int, ...]], room: int, others: Mapping[str, list[int]], num_new: int = 0
    ) -> EncodedRequest:
        """Return a request whose context, the first of `tokens`, is cut on the left to `room` ids for every member."""
        context, *continuation = tokens
        is_cut = any(len(ids) > room for ids in (context, *others.values()))
        kept = {role: ids[-room:] for role, ids in others.items()}
        return cls((context[-room:], *continuation), is_cut, num_new, kept)

    @property
    def length(self) -> int:
        """The number of tokens that are read at most, generated ones among them: all but the last."""
        return sum(map(len, self.tokens)) + self.num_new - 1
