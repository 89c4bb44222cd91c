"""Requests as batches: what runs together, and what is read once for several choices."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from itertools import chain, count, pairwise
from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ensembler.engine.row_cache import common_length
from ensembler.evaluation.passes import Pass, Row, forked_passes, make_pass
from ensembler.evaluation.requests import ScoringRequest

_FORWARD = 16  # a forward costs as much as so many tokens more: one of a token takes about that long

_MOST_TARGETS = 2048  # positions of a pass that go through the heads, for the logits' memory: of texts, not of choices


Done = Set[int]
"""The numbers of requests that are scored already."""


@dataclass(frozen=True)
class Batch:
    """Requests that are scored together, by passes in this order."""

    requests: tuple[ScoringRequest, ...]
    passes: tuple[Pass, ...]

    def num_left(self, done: Done) -> int:
        """Return how many requests have numbers that are not in `done`."""
        return sum(request.number not in done for request in self.requests)


def can_share_contexts(model_configs: Iterable[Any]) -> bool:
    """Whether members of these `transformers` configs keep a cache whose rows can be used for several continuations.

    True where all layers of every member attend, fully or within a window, and its family is known; a recurrent state
    and positions that change with the length of a forward are not trusted.
    """
    return all(map(_keeps_rows, model_configs))


def make_batches(requests: Sequence[ScoringRequest], batch_size: int, *, share_contexts: bool = False) -> list[Batch]:
    """Return batches of `batch_size` requests of similar length, the longest first: too little memory shows at once.

    A pass has at most `batch_size` sequences, fewer of long texts. With `share_contexts`, a context of several choices
    is read once where that saves tokens, and they go on from its cache: ask `can_share_contexts`. Batches depend on
    nothing else.
    """
    ordered = sorted(requests, key=lambda request: (-request.num_positions, request.number))
    batches, numbers = [], count()
    for start in range(0, len(ordered), batch_size):
        together = tuple(ordered[start : start + batch_size])
        slots = count()  # number the tokens of all continuations, in the order of requests and continuations
        rows = [_row(*window, slots) for request in together for window in request.windows()]
        passes = _passes(rows, batch_size, share_contexts)
        batches.append(Batch(together, tuple(replace(one, number=next(numbers)) for one in passes)))
    return batches


def unfinished(batches: Iterable[Batch], done: Done) -> list[Batch]:
    """Return the batches with a request whose number is not in `done`."""
    return [batch for batch in batches if batch.num_left(done)]


def _passes(rows: Sequence[Row], batch_size: int, share_contexts: bool) -> list[Pass]:
    """More choices than `batch_size` allows take several passes."""
    forking = [row for row in rows if len(row.tails) > 1] if share_contexts else []
    if forking:
        shared = forked_passes(forking, batch_size)
        if _cost(shared) < _cost(_whole_passes(forking, batch_size)):
            return [*shared, *_whole_passes([row for row in rows if len(row.tails) == 1], batch_size)]
    return list(_whole_passes(rows, batch_size))


def _whole_passes(rows: Iterable[Row], batch_size: int) -> Iterator[Pass]:
    chunk: list[Row] = []
    for row in chain.from_iterable(row.unforked() for row in rows):
        most = max(len(one.targets) for one in [*chunk, row])
        if chunk and (len(chunk) == batch_size or (len(chunk) + 1) * most > _MOST_TARGETS):
            yield make_pass(chunk)
            chunk = []
        chunk.append(row)
    if chunk:
        yield make_pass(chunk)


def _cost(passes: Iterable[Pass]) -> int:
    """What passes cost, in tokens."""
    return sum(one.step.input_ids.numel() + _FORWARD for one in passes)


def _row(context: tuple[int, ...], continuations: Sequence[tuple[int, ...]], slots: Iterator[int]) -> Row:
    """A context and its tails: continuations without their last tokens, but those that another one begins with.

    Where tails begin alike, the first of them owns the positions, so that each is stored once: of choices of one token
    each, all share the context's last one.
    """
    sequences = sorted({continuation[:-1] for continuation in continuations})
    # Sorted, a beginning stands right before what it begins, and a tail shares most with its neighbours.
    tails = [one for one, after in pairwise(sequences) if not _begins(one, after)] + sequences[-1:]
    owners = [[0] * (len(tails[0]) + 1)]  # for each position of each tail, from the context's last token on
    for number, (before, tail) in enumerate(pairwise(tails), 1):
        shared = 1 + common_length([before, tail])
        owners.append(owners[-1][:shared] + [number] * (len(tail) + 1 - shared))
    at_once: list[tuple[int, int, int]] = []
    behind: list[list[tuple[int, int, int]]] = [[] for _ in tails]
    for ids in continuations:
        own = next(number for number, tail in enumerate(tails) if _begins(ids[:-1], tail))
        for position, token in enumerate(ids):
            scored = behind[owners[own][position]] if position else at_once
            scored.append((len(context) - 1 + position, token, next(slots)))
    rows = (Row(ids, tuple(targets)) for ids, targets in zip(tails, behind, strict=True))
    return Row(context, tuple(at_once), tuple(rows))


def _begins(tail: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return other[: len(tail)] == tail


def _keeps_rows(config: Any) -> bool:
    kind = type(config)
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING or MODEL_FOR_CAUSAL_LM_MAPPING[kind]._is_stateful:
        return False
    rope = str(getattr(config.get_text_config(decoder=True), "rope_parameters", None))
    layers = DynamicCache(config=config).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers) and not (
        "'dynamic'" in rope or "'longrope'" in rope
    )
