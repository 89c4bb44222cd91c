"""Prompts that begin alike: what they share is read once per member, and its cache is handed to every batch.

A batch that begins with a header has the layout of any other one: padding on the left, then the prompts. Its first
columns, as many as the header has tokens, come from the header's cache, shifted behind the padding of each row; what
the shift pushed out is read again with the rest. So positions and masks are those of a batch without a header, and
sliding windows too hold what they would hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ensembler.cache import EnsembleCache
from ensembler.decoding.prompts import EncodedPrompt
from ensembler.modeling import EnsembleForCausalLM
from ensembler.runners import Step

MIN_SHARED = 32  # tokens: below, a forward of its own costs about what it saves
_MOVABLE = (DynamicLayer, DynamicSlidingWindowLayer)  # not what is derived from them


def common_length(rows: Sequence[Sequence[int]]) -> int:
    """Return how many ids all `rows` begin with."""
    return next((i for i, column in enumerate(zip(*rows, strict=False)) if len(set(column)) > 1), min(map(len, rows)))


@dataclass(frozen=True)
class _Run:
    """Neighbouring batches that begin with `header`."""

    header: Sequence[int]
    num_prompts: int
    num_batches: int = 1

    @property
    def saved(self) -> int:
        """How many positions are not read again; 0 where it is not worth it."""
        return (self.num_prompts - 1) * len(self.header) if len(self.header) >= MIN_SHARED else 0

    def joined(self, other: _Run) -> _Run:
        """Both, with what they share."""
        header = self.header[: common_length([self.header, other.header])]
        return _Run(header, self.num_prompts + other.num_prompts, self.num_batches + other.num_batches)


def plan_headers(batches: Sequence[Sequence[Sequence[int]]]) -> list[list[int]]:
    """Return for each batch of prompts (as ids) the header that is read once for it and its neighbours, or [].

    Every prompt keeps at least one token behind its header. Neighbours share a header where that saves more positions
    than headers of their own.
    """
    runs: list[_Run] = []
    for batch in batches:
        length = min(common_length(batch), min(map(len, batch)) - 1)
        run = _Run(batch[0][:length], len(batch))
        if runs and (both := runs[-1].joined(run)).saved and both.saved >= runs[-1].saved + run.saved:
            runs[-1] = both
        else:
            runs.append(run)
    return [list(run.header) if run.saved else [] for run in runs for _ in range(run.num_batches)]


class Header:
    """The beginning of several prompts, read once: a cache of one row for each member."""

    def __init__(self, model: EnsembleForCausalLM, ids: Sequence[int], chunk: int | None = None) -> None:
        """Read `ids`, at most `chunk` positions at a time. Raises RunError or LogitsError as a forward does."""
        self.ids = list(ids)
        # Without a config all layers keep all of it: a window has to be cut behind the padding, which is not known yet.
        self._cache = EnsembleCache({roles: DynamicCache() for roles in model.new_cache().parts})
        for piece in torch.split(torch.tensor([self.ids], device=model.device), chunk or len(self.ids), dim=1):
            model.member_logits(Step(piece, logits_to_keep=1), self._cache)

    def fill(self, cache: EnsembleCache, num_padding: Tensor) -> None:
        """Write the header into an empty `cache` for rows that are padded on the left by `num_padding` (rows,)."""
        columns = (torch.arange(len(self.ids)) - num_padding[:, None]).clamp(min=0)
        for roles, part in self._cache.parts.items():
            for index, layer in enumerate(part.layers):
                keys, values = (_shifted(states, columns) for states in (layer.keys, layer.values))
                cache.parts[roles].update(keys, values, index)


def _shifted(states: Tensor, columns: Tensor) -> Tensor:
    """Take `columns` (rows, positions) of states (blocks, heads, positions, d), as (blocks · rows, heads, ...)."""
    taken = states[:, :, columns.to(states.device)]
    return taken.transpose(1, 2).flatten(0, 1)


class Headers:
    """The headers of a run's batches; the last one that was read is kept."""

    def __init__(
        self, model: EnsembleForCausalLM, batches: Sequence[Sequence[EncodedPrompt]], chunk: int | None = None
    ) -> None:
        planned = plan_headers([[prompt.ids for prompt in batch] for batch in batches])
        self._planned = planned if can_share(model) else [[] for _ in planned]
        self._batches = batches
        self._model = model
        self._chunk = chunk
        self._last: Header | None = None

    @torch.no_grad()
    def cache(self, index: int, num_rows: int, room: int) -> EnsembleCache | None:
        """Return a cache with the header of batch number `index`, `num_rows` for each prompt; None without one.

        `room`: how many tokens may follow.
        """
        if not self._planned or not self._planned[index]:
            return None
        if self._last is None or self._last.ids != self._planned[index]:
            self._last = None  # before the next is read: not both in memory
            self._last = Header(self._model, self._planned[index], self._chunk)
        lengths = torch.tensor([len(prompt.ids) for prompt in self._batches[index]]).repeat_interleave(num_rows)
        cache = self._model.decoding_cache(len(lengths), int(lengths.max()) + room)
        self._last.fill(cache, lengths.max() - lengths)
        return cache


def can_share(model: EnsembleForCausalLM) -> bool:
    """Whether all that the members keep of a text are keys and values: recurrent states cannot be shifted or cut."""
    keeps = all(forward.model._supports_default_dynamic_cache() for group in model.groups for forward in group)
    return keeps and all(type(layer) in _MOVABLE for layer in model.new_cache().layers)
