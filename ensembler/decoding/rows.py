"""Rows of the decode loop, and the texts on them: texts that agree so far share a row. It knows no tensors.

A text is one sample of one prompt at one point of the grid. Rows stand in the members' cache where they stand in the
loop: `condense_rows` says which rows have to be copied where when texts differ and end.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class Text:
    """One text: its `point` of the grid, and the numbers of its prompt and sample, on which its noise depends.

    `key` says to whoever gave it which one it is. When it has ended, `ids` are its new tokens.
    """

    point: int
    prompt: int
    sample: int
    key: Any = None
    ids: list[int] = field(default_factory=list)

    @property
    def has_ended(self) -> bool:
        """Return whether its tokens are all there: an end has at least one."""
        return bool(self.ids)


@dataclass(eq=False)
class Row:
    """Tokens that the members read, prompt first, and the texts that have them.

    At most `limit` tokens; the first `num_read` are in the cache. `columns` are what processors see before the new
    tokens: a prompt as it was given, with its padding; `batch_row` is its place in the batch. `drafts`: tokens that
    were guessed behind the last one.
    """

    ids: list[int]
    num_prompt: int
    limit: int
    texts: list[Text]
    columns: list[int]
    num_read: int = 0
    batch_row: int = 0
    drafts: list[int] = field(default_factory=list)

    @property
    def new_ids(self) -> list[int]:
        """The tokens behind the prompt."""
        return self.ids[self.num_prompt :]

    @property
    def num_new(self) -> int:
        """The number of tokens behind the prompt."""
        return len(self.ids) - self.num_prompt

    @property
    def room(self) -> int:
        """The number of tokens that it may still get."""
        return self.limit - len(self.ids)

    def forked(self, new: Sequence[int], texts: list[Text]) -> Row:
        """Return a row for `texts` of this one, which go on with `new` tokens; all but the last of them were read."""
        ids = [*self.ids, *new]
        return Row(ids, self.num_prompt, self.limit, texts, self.columns, len(ids) - 1, self.batch_row)


def split_rows(
    rows: Sequence[Row], gained: Mapping[Text, list[int]], ended: Container[Text], *, keeps_rows: bool = False
) -> list[list[Row]]:
    """Give texts the tokens that they `gained`; return for each row the rows that its texts go on as.

    Texts that have `ended` leave with their `ids`; texts that gained the same tokens stay together. `keeps_rows`: a row
    whose texts have all ended stays, with none.
    """
    found = []
    for row in rows:
        if not row.texts or row.texts[0] not in gained:  # nobody asked for its tokens: its prompt was read before
            found.append([row])
            continue
        groups: dict[tuple[int, ...], list[Text]] = {}
        for text in row.texts:
            if text in ended:
                text.ids = [*row.new_ids, *gained[text]]
            else:
                groups.setdefault(tuple(gained[text]), []).append(text)
        if not groups and keeps_rows:
            groups[tuple(gained[row.texts[0]])] = []
        found.append([row.forked(new, texts) for new, texts in groups.items()])
    return found


def condense_rows(forks: Sequence[Sequence[Row]]) -> tuple[list[Row], list[tuple[int, int]]]:
    """Put the rows that each old row became into an order without holes, and leave as many as possible where they were.

    Returns the rows in their new order, and pairs of an old row and the new one that it is copied to: all at once.
    """
    num = sum(map(len, forks))
    placed: list[Row | None] = [None] * max(num, len(forks))
    moving: list[tuple[int, Row]] = []
    for source, rows in enumerate(forks):
        for index, row in enumerate(rows):
            if index == 0 and source < num:
                placed[source] = row
            else:
                moving.append((source, row))
    holes = (index for index in range(num) if placed[index] is None)
    copies = []
    for (source, row), target in zip(moving, holes, strict=False):
        placed[target] = row
        copies.append((source, target))
    return [row for row in placed[:num] if row is not None], copies
