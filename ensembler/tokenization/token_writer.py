"""Write text in the tokens of one tokenizer, from its merges: the same tokens as its own, for any piece of bytes.

Byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM) and SentencePiece-BPE that falls back to bytes (Llama 2, Mistral, Gemma).
The tokenizer itself takes whole characters only, and a call of it for every question would take most of a step.
"""

from __future__ import annotations

import codecs
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, cached_property, lru_cache
from itertools import accumulate, islice, pairwise, product
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ensembler.tokenization.merges import Merges, merge, merge_steps
from ensembler.tokenization.token_bytes import TokenBytes

_Found = TypeVar("_Found")
_FEW = 32  # tokens that are tried as the next one without looking at their merges before
_MOST_TRIED = 256  # of more, one is taken to follow: a bound is only larger then
_WORD = b"x"  # spaces before the end of a text are cut otherwise than before a word
_KINDS = (b"x", b".", b"1")  # of characters, as far as they decide where a piece ends
_LONG = 256  # bytes: of texts that are longer, as prompts, few are kept
_Utf8 = codecs.getincrementaldecoder("utf-8")  # keeps the bytes of a character that is not whole
_SPACES = re.compile(r" *[^ ]+| +")  # a word of SentencePiece with the spaces in front of it


class TokenWriter:
    """Writes bytes in the tokens of a vocabulary.

    `split` cuts text into the pieces inside which tokens are merged, `symbols` gives the ids that a piece begins as,
    None where one cannot be written. `added`: tokens that are found in a text before anything else. `takes_whole`: a
    piece that is a token is that token, whatever its merges. `has_pieces`: the pieces are the tokenizer's own; else
    text is cut only where nothing would be merged, and merges alone tell which tokens stand side by side.
    """

    def __init__(
        self,
        tokens: TokenBytes,
        merges: Merges,
        split: Callable[[str], Sequence[bytes]],
        symbols: Callable[[bytes], list[int] | None],
        *,
        added: Mapping[bytes, int] | None = None,
        takes_whole: bool = False,
        has_pieces: bool = True,
    ) -> None:
        self.tokens = tokens
        self._merges = merges
        self._split = split
        self._symbols = symbols
        self._added = TokenBytes({token: spelled for spelled, token in (added or {}).items()})
        self._added_starts = {one[:2] for one in self._added.spelled}
        self._takes_whole = takes_whole
        self._has_pieces = has_pieces
        self.pieces = _kept_by_length(self._pieces)
        self.can_follow = lru_cache(maxsize=1 << 18)(self._can_follow)
        self.can_go_on = lru_cache(maxsize=1 << 16)(self._can_go_on)
        self.can_reach = lru_cache(maxsize=1 << 16)(self._can_reach)
        self.first_rank = cache(self._first_rank)
        self.cuts_behind = lru_cache(maxsize=1 << 18)(self._cuts_behind)
        self._joined = joined_bytes(tokens.spelled)
        self._written = _kept_by_length(self._write)

    def encode(self, text: bytes, num_bytes: int | None = None, *, goes_on: bool = False) -> list[int] | None:
        """Return the tokens of the first `num_bytes` of a text, by the pieces into which it is cut up to there.

        Both may end inside of a character. `goes_on`: the last piece is not whole. None: it cannot be written.
        """
        num_bytes = len(text) if num_bytes is None else num_bytes
        found: list[int] = []
        start = 0
        for piece in self.pieces(_whole_characters(text, num_bytes)):
            kept = piece[: num_bytes - start]
            tokens = self._written(kept, len(kept) == len(piece) and not (goes_on and start + len(kept) == num_bytes))
            if tokens is None:
                return None
            found += tokens
            start += len(kept)
        return found

    def _cuts_behind(self, token: bytes, text: bytes) -> bool:
        """Return whether the bytes of a token are one with `text` behind them, as both would stand before a word."""
        whole = token + text
        tokens = self.encode(whole + _WORD if whole[-1:].isspace() else whole)
        return tokens is not None and tokens[0] == self.tokens.id_of(token)

    def may_join(self, first: int, second: int) -> bool:
        """Return whether two bytes stand beside each other in any token."""
        return bool(self._joined[first, second])

    def boundaries(self, text: bytes) -> list[int]:
        """Return where the pieces of a text begin, in bytes, and its end."""
        return [0, *accumulate(map(len, self.pieces(text)))]

    def _pieces(self, text: bytes) -> tuple[bytes, ...]:
        found: list[bytes] = []
        for is_added, part in self._around_added(text):
            found += [part] if is_added else self._words(part)
        return tuple(found)

    def _words(self, part: bytes) -> list[bytes]:
        """Return the pieces of a part; bytes that are no character stay with the word before, or with the first one."""
        found: list[bytes] = []
        begun = b""
        while part:
            decoder, behind = _Utf8(), b""
            try:
                text, rest = decoder.decode(part), decoder.getstate()[0]
            except UnicodeDecodeError as error:
                end = error.start + 1
                while end < len(part) and part[end] & 0xC0 == 0x80:
                    end += 1
                text, rest, behind = part[: error.start].decode(), part[error.start : end], part[end:]
            words = list(self._split(text)) if text else []
            if words:
                words[0], begun = begun + words[0], b""
            found += words
            if found:
                found[-1] += rest
            else:
                begun += rest
            part = behind
        return [*found, begun] if begun else found

    def _around_added(self, text: bytes) -> list[tuple[bool, bytes]]:
        """Return the parts of a text and whether each is an added token: the leftmost first, then the longest."""
        if not any(text[at : at + num] in self._added_starts for at in range(len(text)) for num in (1, 2)):
            return [(False, text)] if text else []
        found, start, here = [], 0, 0
        while here < len(text):
            places = self._added.within(text[here : here + self._added.longest])
            if not places:
                here += 1
                continue
            if start < here:
                found.append((False, text[start:here]))
            found.append((True, self._added.spelled[places[-1]]))
            here = start = here + len(found[-1][1])
        return [*found, (False, text[start:])] if start < len(text) else found

    def _write(self, piece: bytes, is_whole: bool) -> list[int] | None:
        if is_whole:
            token = self._added.id_of(piece)
            token = self.tokens.id_of(piece) if token is None and self._takes_whole else token
            if token is not None:
                return [token]
        symbols = self._symbols(piece)
        return None if symbols is None else merge(symbols, self._merges)

    def _can_follow(self, first: int, second: int) -> bool:
        """Return whether the tokenizer may write these two tokens, as ids, one behind the other."""
        before, after = self.tokens.texts[first], self.tokens.texts[second]
        symbols = self._symbols(before + after)
        if symbols is not None and merge(symbols, self._merges) == [first, second]:
            return True
        return self._are_apart(before, after)

    def _are_apart(self, before: bytes, after: bytes) -> bool:
        """Return whether a piece may begin with `after` behind `before`."""
        if not (self._has_pieces or before in self._added.places or after in self._added.places):
            return False
        begun, unfinished = _num_inside(before), num_unfinished(after)
        if num_unfinished(before) or _num_inside(after):
            return False
        # A character of which bytes are missing may be of any kind. Neighbours may decide whether the last space of
        # several, the s of 's, or the next digit of a number is a piece of its own.
        firsts = [kind + before[begun:] for kind in _KINDS] if begun else [before]
        lasts = [after[: len(after) - unfinished] + kind for kind in _KINDS] if unfinished else [after]
        ahead = (b"", b".", b"1", b"11") if before[:1].isdigit() else (b"", b".")
        return any(
            len(front + first) in self.boundaries(front + first + last + end)
            for first, last, front, end in product(firsts, lasts, ahead, (b"", b"."))
        )

    def _can_go_on(self, token: int, text: bytes) -> bool:
        """Return whether the tokenizer may write `token` and then tokens that begin with `text` together.

        Half of a text is asked for first: most that fail do so there, and many texts share it.
        """
        if len(text) > 1 and not self.can_go_on(token, text[: 1 << (len(text) - 1).bit_length() - 1]):
            return False
        for place in reversed(self.tokens.within(text)):
            after, rest = int(self.tokens.order[place]), text[len(self.tokens.spelled[place]) :]
            if self.can_follow(token, after) and (not rest or self.can_go_on(after, rest)):
                return True
        return self.can_reach(token, text)

    def _can_reach(self, token: int, text: bytes) -> bool:
        """Return whether the tokenizer may write `token` and then one that begins with `text` and is longer."""
        first, last = self.tokens.starting(text)
        first += text in self.tokens.places
        found: Iterable[int] = range(first, last)
        if last - first > _FEW:
            begun, behind = self._added.starting(text)
            if behind - begun > (text in self._added.places):  # added tokens stand behind any other
                return True
            if self._are_apart(self.tokens.texts[token], text):
                return True
            rank = self._crossing_rank(token, text)
            if rank < math.inf:
                found = self._merging_before(rank, text)
        tried = list(islice(found, _MOST_TRIED + 1))
        if len(tried) > _MOST_TRIED:
            return True
        return any(self.can_follow(token, int(self.tokens.order[place])) for place in tried)

    def _merging_before(self, rank: float, text: bytes) -> Iterator[int]:
        """Yield the places of longer tokens that begin with `text`, whose first symbol merges to its right before."""
        (first_symbol, *_) = self._symbols(text) or [-1]
        seen: set[int] = set()
        for lower, merged in self._merges_by_left.get(first_symbol, ()):
            if lower >= rank:
                return
            start = self.tokens.texts.get(merged, b"")
            if not start.startswith(text) and not text.startswith(start):
                continue
            first, last = self.tokens.starting(max(start, text, key=len))
            for place in range(first + (self.tokens.spelled[first] == text), last):
                if place not in seen and self.first_rank(place) < rank:
                    yield place
                seen.add(place)

    def _crossing_rank(self, token: int, text: bytes) -> float:
        """Return the rank at which the end of `token` merges with the first symbol of `text`; infinity for never.

        What may stand behind the token has a first symbol that merges to its right before.
        """
        behind, symbols = self._symbols(text), self._symbols(self.tokens.texts[token])
        if not behind or not symbols:
            return math.inf
        last, end, since = symbols[-1], len(symbols) - 1, -1
        for step in (*merge_steps(symbols, self._merges), None):
            if step is not None and end not in (step.left, step.right):
                continue
            crossing = self._merges.get((last, behind[0]))
            if crossing is not None and since < crossing[0] < (math.inf if step is None else step.rank):
                return crossing[0]
            if step is not None:
                last, end, since = step.merged, step.left, step.rank
        return math.inf

    @cached_property
    def _merges_by_left(self) -> dict[int, list[tuple[int, int]]]:
        """By the left one of two ids that merge: the ranks and what they become, lower ranks first."""
        found: dict[int, list[tuple[int, int]]] = {}
        for (left, _), step in sorted(self._merges.items(), key=lambda one: one[1]):
            found.setdefault(left, []).append(step)
        return found

    def _first_rank(self, place: int) -> float:
        """Return the rank at which the first symbol of a token merges with the next; infinity for a single one."""
        symbols = self._symbols(self.tokens.spelled[place]) or []
        return next((step.rank for step in merge_steps(symbols, self._merges) if step.left == 0), math.inf)


def _kept_by_length(function: Callable[..., _Found]) -> Callable[..., _Found]:
    """Return a function of bytes that keeps its results: many of short ones, and few of long ones, which are large."""
    many, few = lru_cache(maxsize=1 << 16)(function), lru_cache(maxsize=1 << 9)(function)

    def call(text: bytes, *options: bool) -> _Found:
        return (few if len(text) > _LONG else many)(text, *options)

    return call


def joined_bytes(spelled: Sequence[bytes]) -> NDArray[np.bool_]:
    """Return (256, 256) which bytes stand beside each other inside of a token."""
    together = np.frombuffer(b"".join(spelled), dtype=np.uint8)
    is_inside = np.ones(len(together), dtype=bool)
    is_inside[np.cumsum([len(one) for one in spelled], dtype=np.int64) - 1] = False  # the last byte of each
    firsts = np.flatnonzero(is_inside)
    joined = np.zeros((256, 256), dtype=bool)
    joined[together[firsts], together[firsts + 1]] = True
    return joined


def _num_inside(text: bytes) -> int:
    """Return how many bytes at the beginning belong to a character that began before."""
    return next((at for at, byte in enumerate(text) if byte & 0xC0 != 0x80), len(text))


def num_unfinished(text: bytes) -> int:
    """Return how many bytes at the end belong to a character that goes on behind."""
    decoder = _Utf8(errors="ignore")  # the last bytes may begin inside of a character, too
    decoder.decode(text[-4:])
    return len(decoder.getstate()[0])


def _whole_characters(text: bytes, num_bytes: int) -> bytes:
    """Return the first `num_bytes` of a text, and the rest of the character in which they end."""
    while num_bytes < len(text) and text[num_bytes] & 0xC0 == 0x80:
        num_bytes += 1
    return text[:num_bytes]


def split_at_spaces(text: str) -> list[bytes]:
    """Return the words of a text, each with the spaces in front of it."""
    return [word.encode() for word in _SPACES.findall(text)]


def split_where_apart(joined: NDArray[np.bool_], text: str) -> list[bytes]:
    """Return a text cut between characters whose bytes stand beside each other in no token: none is merged across.

    `joined` (256, 256): which bytes do.
    """
    whole = text.encode()
    data = np.frombuffer(whole, dtype=np.uint8)
    is_apart = ~joined[data[:-1], data[1:]] & ((data[1:] & 0xC0) != 0x80)
    bounds = [0, *(np.flatnonzero(is_apart) + 1).tolist(), len(whole)]
    return [whole[start:end] for start, end in pairwise(bounds)]
