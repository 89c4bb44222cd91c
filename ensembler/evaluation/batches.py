"""Requests as batches: what runs together, and what is read once for several choices."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ensembler.evaluation.passes import Fork, Pass, Row, Target, forked_pass, whole_pass
from ensembler.evaluation.requests import ScoringRequest

_FORWARD = 16  # a forward costs as much as so many tokens more: one of a token takes about that long

_MOST_TARGETS = 2048  # positions of a pass that go through the heads, for the logits' memory: of texts, not of choices


@dataclass(frozen=True)
class Batch:
    """Requests that are scored together; more choices than `batch_size` allows take several passes."""

    requests: tuple[ScoringRequest, ...]
    passes: tuple[Pass, ...]

    @property
    def all_passes(self) -> tuple[Pass, ...]:
        """The passes and their tails, by their numbers."""
        return tuple(one for whole in self.passes for one in whole.together)


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
    batches: list[Batch] = []
    num_passes = 0
    for start in range(0, len(ordered), batch_size):
        together = tuple(ordered[start : start + batch_size])
        batch = Batch(together, tuple(_passes(together, batch_size, num_passes, share_contexts)))
        num_passes += len(batch.all_passes)
        batches.append(batch)
    return batches


def _passes(requests: Sequence[ScoringRequest], batch_size: int, first: int, share_contexts: bool) -> Iterator[Pass]:
    forks = list(_forks(requests))
    forking = [fork for fork in forks if len(fork.tails) > 1] if share_contexts else []
    shared = forked_pass(first, forking, batch_size) if forking else None
    if shared is None or _cost([shared]) >= _cost(list(_whole_passes(forking, batch_size, first))):
        yield from _whole_passes(forks, batch_size, first)
        return
    yield shared
    yield from _whole_passes([fork for fork in forks if len(fork.tails) == 1], batch_size, first + len(shared.together))


def _whole_passes(forks: Sequence[Fork], batch_size: int, first: int) -> Iterator[Pass]:
    chunk: list[Row] = []
    for row in (row for fork in forks for row in fork.whole()):
        most = max(len(one.targets) for one in [*chunk, row])
        if chunk and (len(chunk) == batch_size or (len(chunk) + 1) * most > _MOST_TARGETS):
            yield whole_pass(first, chunk)
            chunk, first = [], first + 1
        chunk.append(row)
    if chunk:
        yield whole_pass(first, chunk)


def _cost(passes: Sequence[Pass]) -> int:
    """What passes cost, in tokens."""
    return sum(one.input_ids.numel() + _FORWARD for whole in passes for one in whole.together)


def _forks(requests: Sequence[ScoringRequest]) -> Iterator[Fork]:
    """Slots number the tokens of all continuations, in the order of requests and continuations."""
    slot = 0
    for request in requests:
        for context, continuations in request.windows():
            yield _fork(context, continuations, slot)
            slot += sum(map(len, continuations))


def _fork(context: tuple[int, ...], continuations: Sequence[tuple[int, ...]], slot: int) -> Fork:
    tails, owners = _tails(continuations)
    behind: list[list[Target]] = [[] for _ in tails]
    at_once: list[Target] = []
    for ids in continuations:
        tail = next(index for index, tail in enumerate(tails) if _begins(ids[:-1], tail))
        for position, token in enumerate(ids):
            if position:
                behind[owners[tail][position]].append(Target(position - 1, token, slot))
            else:
                at_once.append(Target(len(context) - 1, token, slot))
            slot += 1
    rows = (Row(ids, tuple(targets)) for ids, targets in zip(tails, behind, strict=True))
    return Fork(Row(context, tuple(at_once)), tuple(rows))


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


def _keeps_rows(config: Any) -> bool:
    kind = type(config)
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING or MODEL_FOR_CAUSAL_LM_MAPPING[kind]._is_stateful:
        return False
    rope = str(getattr(config.get_text_config(decoder=True), "rope_parameters", None))
    layers = DynamicCache(config=config).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers) and not (
        "'dynamic'" in rope or "'longrope'" in rope
    )
