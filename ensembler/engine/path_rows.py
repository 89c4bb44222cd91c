"""Rows of one member for texts that come and go: each is read behind what some row holds of it already.

Whoever asks gives whole texts; which row has read how much of them is known here alone. So siblings of a tree of tokens
take turns on a row, and a text that parts from another finds its beginning there.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ensembler.engine.member_set import MemberSet
from ensembler.engine.model_runner import check_nan
from ensembler.engine.prefill import prefill, unread_to_the_right
from ensembler.engine.row_cache import RowCache

_FEWEST_MORE = 2  # rows beside one for each text, and a quarter as many: for other ways to write some of them
_LIVE = 16  # calls after which a row that nobody reads is of a text that has ended
_COPIED = 4  # tokens that are copied from another row rather than read again


class PathRows:
    """The rows of a member set that has one member, of a role."""

    def __init__(self, members: MemberSet, role: str) -> None:
        self.role = role
        self._members = members
        self._cache: RowCache | None = None
        self._num_rows = 0
        self._calls = 0
        self._used: dict[int, int] = {}  # the last call that read each row

    def forget(self) -> None:
        """Let go of all rows: the model may be another, elsewhere, or have other weights than when it read them."""
        self._cache = None
        self._num_rows = 0
        self._used.clear()

    def logits(self, texts: Sequence[Sequence[int]], num_last: int = 1) -> Tensor:
        """Return the logits (texts, num_last, V) behind the last tokens of texts, as ids, from one forward.

        Only what no row has read is read, and those last tokens; of shorter texts the first logits mean nothing.
        Raises LogitsError for NaN, RunError; nothing is held then.
        """
        cache = self._reserved(len(texts), max(map(len, texts)))
        rows = self._place(cache, texts)
        first, last = min(rows), max(rows)
        by_row = dict(zip(rows, texts, strict=True))
        read = [by_row.get(row, ()) for row in range(first, last + 1)]
        held = [cache.num_held(row, ids) if ids else 0 for row, ids in enumerate(read, start=first)]
        num_held = [max(0, min(num, len(ids) - num_last)) for num, ids in zip(held, read, strict=True)]
        ids, positions = unread_to_the_right(read, num_held)
        try:
            logits = prefill(self._members.logits, cache, ids, positions, first_row=first, num_kept=num_last)[self.role]
            wanted = logits[[row - first for row in rows]]
            check_nan({self.role: wanted})
        except BaseException:
            self.forget()
            raise
        self._calls += 1
        for row, text in by_row.items():
            cache.hold([list(text)], [len(text)], row)
            self._used[row] = self._calls
        return wanted

    def reserve(self, num_texts: int) -> int:
        """Set for how many texts that go on there is to be room; return how many texts one forward may have then."""
        self._num_rows = max(self._num_rows, num_texts + max(_FEWEST_MORE, num_texts // 4))
        return self._num_rows

    def _reserved(self, num_texts: int, room: int) -> RowCache:
        """Return the cache, with room for texts."""
        num_rows = max(num_texts, self._num_rows)
        if self._cache is None or self._cache.num_rows < num_rows:  # read anew, once: it would grow to a power of two
            self._cache = None  # before the next is allocated
            self._cache = self._members.row_cache(num_rows, room + 1, room)
            self._used.clear()
        self._cache.reserve(num_rows, room)
        return self._cache

    def _place(self, cache: RowCache, texts: Sequence[Sequence[int]]) -> list[int]:
        """Return a row for each text: the free one that loses least, with what another one holds of the text copied."""
        rows: list[int] = []
        for text in texts:
            ready = (row for row in range(cache.num_rows) if self._is_read(cache, row, text) and row not in rows)
            if (row := next(ready, None)) is not None:
                rows.append(row)
                continue
            held = [cache.num_held(row, text) for row in range(cache.num_rows)]
            lost = [length - num for length, num in zip(cache.lengths, held, strict=True)]
            free = [row for row in range(cache.num_rows) if row not in rows]
            row = min(free, key=lambda one: (lost[one] if self._is_live(one) else 0, -held[one]))
            best = max(range(cache.num_rows), key=held.__getitem__)
            if held[best] >= held[row] + _COPIED:
                cache.copy_rows([best], [row], held[best])
                cache.hold([list(text[: held[best]])], [held[best]], row)
            rows.append(row)
        return rows

    def _is_read(self, cache: RowCache, row: int, text: Sequence[int]) -> bool:
        """Return whether a row holds the beginning of a text, all but a few tokens, and nothing else."""
        num = cache.lengths[row]
        return max(1, len(text) - _COPIED) <= num < len(text) and cache.num_held(row, text) == num

    def _is_live(self, row: int) -> bool:
        return self._used.get(row, -_LIVE) > self._calls - _LIVE
