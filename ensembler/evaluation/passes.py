"""Forwards of all members: rows of token ids as one tensor, and where in their logits the tokens are that count.

Rows are padded on the right, where under a causal mask no token sees the padding. Only contexts whose cache is used
again are padded on the left, with a mask, so that what follows stands right behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ensembler.engine.ensemble_cache import EnsembleCache
from ensembler.engine.forward import Step

RunStep = Callable[[Step, EnsembleCache | None], dict[str, Tensor]]
"""Returns the logits (rows, num_kept, V_member) of members by role, whose caches advance."""

_PADDING = 0  # any id: what is computed from it is not read


@dataclass(frozen=True)
class Target:
    """A token that is scored by the logits at `column` of a row; `slot` is its number among those of the batch."""

    column: int
    token: int
    slot: int


@dataclass(frozen=True)
class Row:
    """Token ids that are read, and what is scored behind them."""

    ids: tuple[int, ...]
    targets: tuple[Target, ...]


@dataclass(frozen=True)
class Fork:
    """A context and the tails that are read behind it, each by itself."""

    context: Row
    tails: tuple[Row, ...]

    def whole(self) -> list[Row]:
        """The context before each of the tails; what the context's own logits score, the first of them does."""
        start = len(self.context.ids)
        rows: list[Row] = []
        for tail in self.tails:
            targets = tuple(replace(target, column=start + target.column) for target in tail.targets)
            rows.append(Row(self.context.ids + tail.ids, targets if rows else self.context.targets + targets))
        return rows


@dataclass(frozen=True)
class Pass:
    """One forward of every member: rows of a batch, and the logits that are needed of it.

    `number` counts the passes of a run. `input_ids` (rows, positions) int64. `kept` (num_kept,): the positions that go
    through the vocabulary head. `rows` and `columns` (num_needed,): which rows, and which of the kept positions, are
    needed. `tokens`, `needed` and `slots` (num_tokens,): the tokens that are scored, by which of the needed logits, and
    their numbers in the batch. Tokens of several choices may share one position.

    `tails` are passes that go on from the cache of this one: row i behind its row `parents[i]`. `attention_mask` and
    `position_ids`: as in Step, where contexts are padded.
    """

    number: int
    input_ids: Tensor
    kept: Tensor
    rows: Tensor
    columns: Tensor
    tokens: Tensor
    needed: Tensor
    slots: Tensor
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    parents: Tensor | None = None
    tails: tuple[Pass, ...] = ()

    @property
    def step(self) -> Step:
        """The input for the members. Without a mask: nothing that is needed stands behind padding."""
        return Step(self.input_ids, self.attention_mask, self.position_ids, logits_to_keep=self.kept)

    @property
    def num_needed(self) -> int:
        """The number of rows of logits that each member contributes."""
        return self.rows.shape[0]

    @property
    def together(self) -> tuple[Pass, ...]:
        """This pass and its tails."""
        return (self, *self.tails)

    def take(self, logits: Tensor) -> Tensor:
        """Return the needed logits (num_needed, V) of those that a member computed, (rows, num_kept, V)."""
        if self.num_needed == logits.shape[0] * logits.shape[1]:
            return logits.flatten(0, 1)  # all are, in their order: no copy
        return logits[self.rows.to(logits.device), self.columns.to(logits.device)]


def run_pass(
    one: Pass, run: RunStep, new_cache: Callable[[], EnsembleCache]
) -> Iterator[tuple[Pass, dict[str, Tensor]]]:
    """Yield a pass, and each of its tails, with the needed logits (num_needed, V_member) of members by role."""
    cache = new_cache() if one.tails else None
    yield one, _taken(one, run(one.step, cache))
    for tail in one.tails:
        assert cache is not None
        assert tail.parents is not None
        yield tail, _taken(tail, run(tail.step, cache.selected(tail.parents)))


def _taken(one: Pass, logits: dict[str, Tensor]) -> dict[str, Tensor]:
    return {role: one.take(values) for role, values in logits.items()}


def whole_pass(number: int, rows: Sequence[Row]) -> Pass:
    """Return the pass of rows that are read from their first token on."""
    return _pass(number, rows, [0] * len(rows))


def forked_pass(number: int, forks: Sequence[Fork], batch_size: int) -> Pass:
    """Return the pass of the contexts, with passes of at most `batch_size` tails."""
    lengths = [len(fork.context.ids) for fork in forks]
    padding = [max(lengths) - length for length in lengths]
    whole = _pass(number, [fork.context for fork in forks], padding)
    if any(padding):
        places = torch.arange(max(lengths)) - torch.tensor(padding)[:, None]
        whole = replace(whole, attention_mask=(places >= 0).long(), position_ids=places.clamp(min=0))
    rows = [(parent, tail) for parent, fork in enumerate(forks) for tail in fork.tails]
    chunks = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    tails = (_tail_pass(whole, number + 1 + index, chunk, lengths) for index, chunk in enumerate(chunks))
    return replace(whole, tails=tuple(tails))


def _tail_pass(contexts: Pass, number: int, chunk: Sequence[tuple[int, Row]], lengths: Sequence[int]) -> Pass:
    parents = torch.tensor([parent for parent, _ in chunk])
    one = replace(_pass(number, [tail for _, tail in chunk], [0] * len(chunk)), parents=parents)
    if contexts.attention_mask is None:
        return one
    mask = torch.cat([contexts.attention_mask[parents], torch.ones_like(one.input_ids)], dim=1)
    positions = torch.tensor(lengths)[parents, None] + torch.arange(one.input_ids.shape[1])
    return replace(one, attention_mask=mask, position_ids=positions)


def _pass(number: int, rows: Sequence[Row], padding: Sequence[int]) -> Pass:
    """Rows, each behind so much `padding`."""
    longest = max(before + len(row.ids) for before, row in zip(padding, rows, strict=True))
    targets = [
        (index, before + target.column, target)
        for index, (before, row) in enumerate(zip(padding, rows, strict=True))
        for target in row.targets
    ]
    places = sorted({(index, column) for index, column, _ in targets})
    kept = sorted({column for _, column in places})
    index_of_place = {place: index for index, place in enumerate(places)}
    index_of_column = {column: index for index, column in enumerate(kept)}
    padded = [
        [*[_PADDING] * before, *row.ids, *[_PADDING] * (longest - before - len(row.ids))]
        for before, row in zip(padding, rows, strict=True)
    ]
    return Pass(
        number=number,
        input_ids=torch.tensor(padded),
        kept=torch.tensor(kept),
        rows=torch.tensor([index for index, _ in places]),
        columns=torch.tensor([index_of_column[column] for _, column in places]),
        tokens=torch.tensor([target.token for _, _, target in targets]),
        needed=torch.tensor([index_of_place[index, column] for index, column, _ in targets]),
        slots=torch.tensor([target.slot for _, _, target in targets]),
    )
