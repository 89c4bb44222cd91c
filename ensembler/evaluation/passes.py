"""Forwards of all members: rows of token ids as one tensor, and where in their logits the tokens are that count.

Rows are padded on the right, where under a causal mask no token sees the padding. Only contexts whose cache is used
again are padded on the left, with a mask, so that what follows stands right behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ensembler.engine.ensemble_cache import EnsembleCache
from ensembler.engine.forward import Step

RunStep = Callable[[Step, EnsembleCache | None], Mapping[str, Tensor]]
"""Returns the logits (rows, num_kept, V_member) of members by role, whose caches advance."""

Logits = dict[str, Tensor]
"""For a pass, the needed logits (num_needed, V_member) of members by role."""

_PADDING = 0  # any id: what is computed from it is not read


@dataclass(frozen=True)
class Row:
    """Token ids that are read, and tails that are read behind them, each by itself.

    `targets`: (column, token, slot) of each token that the logits of these ids score: the column of the logits, counted
    from the first token of the context; the token's id; its number among the tokens of the batch.
    """

    ids: tuple[int, ...]
    targets: tuple[tuple[int, int, int], ...]
    tails: tuple[Row, ...] = ()

    def unforked(self) -> list[Row]:
        """Return a row for each tail, the ids before it; the first also has the targets of the ids themselves."""
        first, *others = (Row(self.ids + tail.ids, tail.targets) for tail in self.tails)
        return [replace(first, targets=self.targets + first.targets), *others]


@dataclass(frozen=True, eq=False)
class Pass:
    """One forward of every member: rows of a batch, and the logits that are needed of it.

    `step`: rows of ids, of which some positions go through the vocabulary head. `taken` (num_needed,): which of the
    logits are needed, counted row by row. `tokens`, `needed` and `slots` (num_tokens,): the tokens that are scored, by
    which of the needed logits, and their numbers in the batch. Tokens of several choices may share one position.

    Row i of a pass with `parents` stands behind row `parents[i]` of the last pass before it that `is_forked`. `number`
    counts the passes of a run.
    """

    step: Step
    taken: Tensor
    tokens: Tensor
    needed: Tensor
    slots: Tensor
    parents: Tensor | None = None
    is_forked: bool = False
    number: int = 0

    def take(self, logits: Mapping[str, Tensor]) -> Logits:
        """Return the needed logits of those that members computed, (rows, num_kept, V_member)."""
        flat = {role: values.flatten(0, 1) for role, values in logits.items()}
        return {
            role: values if values.shape[0] == len(self.taken) else values[self.taken.to(values.device)]  # all: no copy
            for role, values in flat.items()
        }


def run_passes(
    passes: Iterable[Pass], run: RunStep, new_cache: Callable[[], EnsembleCache]
) -> Iterator[tuple[Pass, Logits]]:
    """Yield one pass after another with the needed logits of the members."""
    cache = None
    for one in passes:
        if one.parents is None:
            cache = new_cache() if one.is_forked else None
            logits = run(one.step, cache)
        else:
            assert cache is not None
            logits = run(one.step, cache.selected(one.parents))
        yield one, one.take(logits)


def make_pass(
    rows: Sequence[Row], shifts: Sequence[int] = (), mask: Tensor | None = None, positions: Tensor | None = None
) -> Pass:
    """Return the pass of rows that are read from their first token on.

    With `shifts`, their columns are shifted: to the right by so much padding before them, to the left by a context;
    `mask` and `positions` are those of a Step then.
    """
    shifts = shifts or [0] * len(rows)
    padded = [[_PADDING] * shift + list(row.ids) for shift, row in zip(shifts, rows, strict=True)]
    longest = max(map(len, padded))
    ids = torch.tensor([one + [_PADDING] * (longest - len(one)) for one in padded])
    targets = [
        ((index, shift + column), token, slot)
        for index, (shift, row) in enumerate(zip(shifts, rows, strict=True))
        for column, token, slot in row.targets
    ]
    needed = {place: number for number, place in enumerate(sorted({place for place, _, _ in targets}))}
    kept = {column: number for number, column in enumerate(sorted({column for _, column in needed}))}
    return Pass(
        Step(ids, mask, None if mask is None else positions, logits_to_keep=torch.tensor(list(kept))),
        taken=torch.tensor([index * len(kept) + kept[column] for index, column in needed]),
        tokens=torch.tensor([token for _, token, _ in targets]),
        needed=torch.tensor([needed[place] for place, _, _ in targets]),
        slots=torch.tensor([slot for _, _, slot in targets]),
    )


def forked_passes(rows: Sequence[Row], batch_size: int) -> list[Pass]:
    """Return the pass of the rows' own ids, and behind it passes of at most `batch_size` of their tails."""
    lengths = torch.tensor([len(row.ids) for row in rows])
    padding = lengths.max() - lengths
    places = torch.arange(int(lengths.max())) - padding[:, None]
    mask = (places >= 0).long() if padding.any() else None
    passes = [replace(make_pass(rows, padding.tolist(), mask, places.clamp(min=0)), is_forked=True)]
    tails = [(parent, tail) for parent, row in enumerate(rows) for tail in row.tails]
    for start in range(0, len(tails), batch_size):
        of, chunk = zip(*tails[start : start + batch_size], strict=True)
        parents = torch.tensor(of)
        behind = lengths[parents]
        positions = behind[:, None] + torch.arange(max(len(tail.ids) for tail in chunk))
        seen = None if mask is None else torch.cat([mask[parents], torch.ones_like(positions)], dim=1)
        passes.append(replace(make_pass(chunk, (-behind).tolist(), seen, positions), parents=parents))
    return passes
