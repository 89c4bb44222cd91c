"""Divide requests into batches and forwards; a context of several choices may be read once.

Rows are padded on the right, where under a causal mask no token sees the padding. Only contexts whose cache is used
again are padded on the left, with a mask, so that what follows stands right behind them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ensembler.engine.member_set import MemberSet
from ensembler.engine.model_runner import Step
from ensembler.evaluation.requests import ScoringRequest

_FORWARD = 16  # a forward costs as much as so many tokens more: one of a token takes about that long
_MOST_TARGETS = 2048  # positions of a pass that go through the heads, for the logits' memory: of texts, not of choices

Logits = dict[str, Tensor]
"""For a pass, the needed logits (num_needed, V_member) of members by role."""


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


@dataclass(frozen=True)
class Batch:
    """Requests that are scored together, by passes in this order."""

    requests: tuple[ScoringRequest, ...]
    passes: tuple[Pass, ...]


@dataclass(frozen=True)
class _Row:
    """Token ids that are read, the first of them at position `start`.

    `targets`: (position, token, slot) of each token that their logits score: the position of the id before the token;
    its own id; its number in the batch. `num_context`: how many ids are the context, as in other rows of it.
    """

    ids: tuple[int, ...]
    targets: tuple[tuple[int, int, int], ...]
    num_context: int
    start: int = 0

    def part(self, first: int, last: int) -> _Row:
        """Return the ids at positions from `first` up to `last`, with their targets."""
        targets = tuple(target for target in self.targets if first <= target[0] < last)
        return replace(self, ids=self.ids[first:last], targets=targets, start=first)


def can_share_contexts(model_configs: Iterable[Any]) -> bool:
    """Return whether members of these `transformers` configs can read several continuations from one context's cache.

    They can where all layers of every member attend, fully or within a window, and its family is known; a recurrent
    state and positions that change with the length of a forward are not trusted.
    """
    return all(map(_keeps_rows, model_configs))


def _keeps_rows(config: Any) -> bool:
    kind = type(config)
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return False
    model = MODEL_FOR_CAUSAL_LM_MAPPING[kind]
    if model._is_stateful or "past_key_values" not in inspect.signature(model.forward).parameters:
        return False
    rope = str(getattr(config.get_text_config(decoder=True), "rope_parameters", None))
    layers = DynamicCache(config=config).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers) and not (
        "'dynamic'" in rope or "'longrope'" in rope
    )


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
        windows = [window for request in together for window in request.windows()]
        forks = [_rows(*window, slots, share_contexts=share_contexts) for window in windows]
        passes = _passes(forks, batch_size, share_contexts)
        batches.append(Batch(together, tuple(replace(one, number=next(numbers)) for one in passes)))
    return batches


def _rows(
    context: tuple[int, ...],
    continuations: Sequence[tuple[int, ...]],
    slots: Iterator[int],
    *,
    share_contexts: bool,
) -> list[_Row]:
    """Return the rows that are read for a context and its continuations, whose last tokens nothing follows.

    With `share_contexts`, what another row begins with is no row of its own, and where rows begin alike, the first of
    them has the targets, so that each of the logits is stored once. Else a row scores what it is read for alone: of
    choices of one token each, all share the context in any case.
    """
    texts = sorted({context + continuation[:-1] for continuation in continuations})
    # Sorted, a beginning stands right before what it begins.
    rows = [one for one, after in pairwise(texts) if not share_contexts or after[: len(one)] != one] + texts[-1:]
    targets: list[list[tuple[int, int, int]]] = [[] for _ in rows]
    for continuation in continuations:
        text = context + continuation
        owner = 0 if share_contexts else rows.index(text[:-1])
        for position, token in enumerate(continuation, len(context) - 1):
            while rows[owner][position] != text[position]:
                owner += 1
            targets[owner].append((position, token, next(slots)))
    return [_Row(ids, tuple(of_row), len(context)) for ids, of_row in zip(rows, targets, strict=True)]


def _passes(forks: Sequence[Sequence[_Row]], batch_size: int, share_contexts: bool) -> list[Pass]:
    """Return the passes for rows by their contexts: whole ones, or contexts and tails where that costs less."""
    forking = [rows for rows in forks if len(rows) > 1] if share_contexts else []
    if forking:
        shared = _forked_passes(forking, batch_size)
        if _cost(shared) < _cost(_whole_passes(forking, batch_size)):
            return shared + _whole_passes([rows for rows in forks if len(rows) == 1], batch_size)
    return _whole_passes(forks, batch_size)


def _cost(passes: Sequence[Pass]) -> int:
    """Return the cost of passes, in tokens."""
    return sum(one.step.input_ids.numel() + _FORWARD for one in passes)


def _whole_passes(forks: Iterable[Sequence[_Row]], batch_size: int) -> list[Pass]:
    chunks: list[list[_Row]] = [[]]
    for row in chain.from_iterable(forks):
        chunk = chunks[-1]
        most = max(len(one.targets) for one in [*chunk, row])
        if chunk and (len(chunk) == batch_size or (len(chunk) + 1) * most > _MOST_TARGETS):
            chunks.append([])
        chunks[-1].append(row)
    return [_make_pass(chunk) for chunk in chunks if chunk]


def _forked_passes(forks: Sequence[Sequence[_Row]], batch_size: int) -> list[Pass]:
    """Return the pass of the contexts, and behind it passes of at most `batch_size` tails."""
    contexts = _make_pass([rows[0].part(0, rows[0].num_context) for rows in forks], is_forked=True)
    tails = [row.part(row.num_context, len(row.ids)) for rows in forks for row in rows]
    parents = torch.tensor([parent for parent, rows in enumerate(forks) for _ in rows])
    parts = [slice(start, start + batch_size) for start in range(0, len(tails), batch_size)]
    return [contexts, *(_make_pass(tails[part], behind=(contexts, parents[part])) for part in parts)]


def _make_pass(rows: Sequence[_Row], *, is_forked: bool = False, behind: tuple[Pass, Tensor] | None = None) -> Pass:
    """Return the pass of rows, those of tails `behind` a pass of contexts, which comes with the parent of each row."""
    side = "left" if is_forked else "right"
    ids = pad_sequence([torch.tensor(row.ids) for row in rows], batch_first=True, padding_side=side)
    starts = [len(row.ids) - ids.shape[1] if is_forked else row.start for row in rows]
    positions = torch.tensor(starts)[:, None] + torch.arange(ids.shape[1])
    mask = (positions >= 0).long() if positions.min() < 0 else None
    parents = None
    if behind is not None:
        contexts, parents = behind
        past = contexts.step.attention_mask
        mask = None if past is None else torch.cat([past[parents], torch.ones_like(ids)], dim=1)
    targets = [
        (index, position - start, token, slot)
        for index, (row, start) in enumerate(zip(rows, starts, strict=True))
        for position, token, slot in row.targets
    ]
    indices, columns, tokens, slots = torch.tensor(targets).T.contiguous()
    lengths = torch.tensor([[row.start + len(row.ids)] for row in rows])
    kept, columns = columns.unique(return_inverse=True)
    taken, needed = (indices * len(kept) + columns).unique(return_inverse=True)
    step = Step(ids, mask, None if mask is None else positions.clamp(min=0), logits_to_keep=kept, lengths=lengths)
    return Pass(step, taken, tokens, needed, slots, parents, is_forked)


def run_passes(passes: Iterable[Pass], members: MemberSet) -> Iterator[tuple[Pass, Logits]]:
    """Yield one pass after another with the needed logits of the members."""
    contexts = None
    for one in passes:
        if one.parents is None:
            contexts = members.new_cache() if one.is_forked else None
            logits = members.logits(one.step, contexts)
        else:
            assert contexts is not None
            logits = members.logits(one.step, contexts.selected(one.parents))
        yield one, {role: _take(values.flatten(0, 1), one.taken) for role, values in logits.items()}


def _take(values: Tensor, taken: Tensor) -> Tensor:
    return values if len(values) == len(taken) else values[taken.to(values.device)]  # all: no copy
