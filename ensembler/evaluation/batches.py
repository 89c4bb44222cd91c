"""Requests as batches: which sequences run together, which of their positions are needed, and for which tokens.

Sequences are padded on the right, so that under a causal mask no token sees padding and all positions are right
whatever the member's position encoding.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from ensembler.evaluation.requests import ScoringRequest
from ensembler.runners import Step

_PADDING = 0  # any id: what is computed from it is not read


@dataclass(frozen=True)
class Target:
    """A token that is scored: of which continuation of the batch, and by the logits at `column` of which sequence."""

    sequence: int
    column: int
    token: int
    continuation: int


@dataclass(frozen=True)
class Pass:
    """One forward of every member: sequences of a batch, and the logits that are needed of it.

    `number` counts the passes of a run. `input_ids` (rows, positions) int64. `kept` (num_kept,): the positions that go
    through the vocabulary head. `rows` and `columns` (num_needed,): which rows, and which of the kept positions, are
    needed. `tokens`, `needed` and `continuations` (num_tokens,): the tokens that are scored, by which of the needed
    logits, and to which continuation of the batch they belong. Tokens of several choices may share one position.
    """

    number: int
    input_ids: Tensor
    kept: Tensor
    rows: Tensor
    columns: Tensor
    tokens: Tensor
    needed: Tensor
    continuations: Tensor

    @property
    def step(self) -> Step:
        """The input for the members. Without a mask: nothing that is needed stands behind padding."""
        return Step(self.input_ids, logits_to_keep=self.kept)

    @property
    def num_needed(self) -> int:
        """The number of rows of logits that each member contributes."""
        return self.rows.shape[0]

    def take(self, logits: Tensor) -> Tensor:
        """Return the needed logits (num_needed, V) of those that a member computed, (rows, num_kept, V)."""
        return logits[self.rows.to(logits.device), self.columns.to(logits.device)]


@dataclass(frozen=True)
class Batch:
    """Requests that are scored together; more choices than `batch_size` allows take several passes."""

    requests: tuple[ScoringRequest, ...]
    passes: tuple[Pass, ...]


def make_batches(requests: Sequence[ScoringRequest], batch_size: int) -> list[Batch]:
    """Return batches of `batch_size` requests of similar length, the longest first: too little memory shows at once.

    A pass has at most `batch_size` sequences. Batches depend on the requests and the size alone.
    """
    ordered = sorted(requests, key=lambda request: (-request.num_positions, request.number))
    batches: list[Batch] = []
    num_passes = 0
    for start in range(0, len(ordered), batch_size):
        together = tuple(ordered[start : start + batch_size])
        passes = tuple(_passes(together, batch_size, num_passes))
        num_passes += len(passes)
        batches.append(Batch(together, passes))
    return batches


def _passes(requests: Sequence[ScoringRequest], batch_size: int, first: int) -> Iterator[Pass]:
    sequences: list[tuple[int, ...]] = []
    targets: list[Target] = []
    num_continuations = 0
    for request in requests:
        tails, owners = _tails(request.continuations)
        for continuation, ids in enumerate(request.continuations, num_continuations):
            tail = bisect_left(tails, ids[:-1])
            targets += [
                Target(
                    len(sequences) + owners[tail][position], len(request.context) - 1 + position, token, continuation
                )
                for position, token in enumerate(ids)
            ]
        sequences += [request.context + tail for tail in tails]
        num_continuations += len(request.continuations)
    for number, start in enumerate(range(0, len(sequences), batch_size), first):
        mine = range(start, min(start + batch_size, len(sequences)))
        here = [target for target in targets if target.sequence in mine]
        yield _pass(number, sequences[mine.start : mine.stop], here, start)


def _tails(continuations: Sequence[tuple[int, ...]]) -> tuple[list[tuple[int, ...]], list[list[int]]]:
    """Return what has to be run behind the context, sorted, and for each position of each tail the tail that owns it.

    A tail is a continuation without its last token, and no beginning of another tail. It has one position more than
    tokens: the first is that of the context's last token. Where tails begin alike, the first of them owns the
    positions, so that each is stored once: of choices of one token each, all share one.
    """
    whole = sorted({continuation[:-1] for continuation in continuations})
    # Sorted, a beginning stands right before what it begins, and a tail shares most with its neighbours.
    tails = [
        tail for tail, after in zip(whole, [*whole[1:], None], strict=True) if not after or not _begins(tail, after)
    ]
    owners: list[list[int]] = []
    for number, tail in enumerate(tails):
        shared = 0
        if number:
            pairs = zip(tails[number - 1], tail, strict=False)
            shared = 1 + sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            owners.append(owners[-1][:shared] + [number] * (len(tail) + 1 - shared))
        else:
            owners.append([0] * (len(tail) + 1))
    return tails, owners


def _begins(tail: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return other[: len(tail)] == tail


def _pass(number: int, sequences: Sequence[tuple[int, ...]], targets: Sequence[Target], first: int) -> Pass:
    longest = max(map(len, sequences))
    places = sorted({(target.sequence - first, target.column) for target in targets})
    kept = sorted({column for _, column in places})
    index_of_place = {place: index for index, place in enumerate(places)}
    index_of_column = {column: index for index, column in enumerate(kept)}
    return Pass(
        number=number,
        input_ids=torch.tensor([[*ids, *[_PADDING] * (longest - len(ids))] for ids in sequences]),
        kept=torch.tensor(kept),
        rows=torch.tensor([row for row, _ in places]),
        columns=torch.tensor([index_of_column[column] for _, column in places]),
        tokens=torch.tensor([target.token for target in targets]),
        needed=torch.tensor([index_of_place[target.sequence - first, target.column] for target in targets]),
        continuations=torch.tensor([target.continuation for target in targets]),
    )
