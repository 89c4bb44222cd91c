"""The tokens with which a text begins whatever follows it.

Any tokenisation of a text that goes on has one token that reaches the end of what is known, or beyond: it begins at a
*cut*, and before the cut stand the tokens of the text up to there. A token is stable where all cuts agree on it.
"""

from __future__ import annotations

from ensembler.tokenization.token_writer import TokenWriter


def live_cuts(writer: TokenWriter, text: bytes) -> list[list[int]]:
    """Return the tokens before each cut of a text: its end, and where a token longer than the rest may begin."""
    ends = [writer.encode(text), writer.encode(text, goes_on=True)]  # whether its last piece is whole is not known
    found = [tokens for tokens in ends if tokens is not None]
    for cut in range(len(text) - 1, max(len(text) - writer.tokens.longest, -1), -1):
        rest = text[cut:]
        first, last = writer.tokens.starting(rest)
        if last - first == (rest in writer.tokens.places):
            continue
        before = writer.encode(text, cut)
        if before is not None and (not before or writer.can_reach(before[-1], rest)):
            found.append(before)
    return found


def stable_tokens(writer: TokenWriter, text: bytes) -> list[int]:
    """Return the ids of the tokens that stay whatever follows. `text` begins at a cut, and ends with a character."""
    common = []
    for column in zip(*live_cuts(writer, text), strict=False):
        if len(set(column)) > 1:
            break
        common.append(column[0])
    return common
