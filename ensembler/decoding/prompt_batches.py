"""Prompts as batches for `generate`: which run together, padded how, and what they share at their beginnings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig

from ensembler.decoding.loop import read_in_chunks
from ensembler.decoding.prompts import EncodedPrompt
from ensembler.decoding.rows import Row
from ensembler.engine.row_cache import RowCache, common_length
from ensembler.modeling import EnsembleForCausalLM

MIN_SHARED = 32  # tokens: below, a forward of its own costs about what it saves


@dataclass(frozen=True)
class _Run:
    """Neighbouring prompts that begin with `header`."""

    header: Sequence[int]
    num_prompts: int = 1

    @property
    def saved(self) -> int:
        """The number of positions that are not read again; 0 where it is not worth it."""
        return (self.num_prompts - 1) * len(self.header) if len(self.header) >= MIN_SHARED else 0

    def joined(self, other: _Run) -> _Run:
        """Both, with what they share."""
        header = self.header[: common_length([self.header, other.header])]
        return _Run(header, self.num_prompts + other.num_prompts)


def plan_headers(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return for each prompt, as ids, the header that is read once for it and its neighbours, or [].

    Every prompt keeps at least one token behind its header. Neighbours share a header where that saves more positions
    than headers of their own.
    """
    runs: list[_Run] = []
    for ids in prompts:
        run = _Run(ids[:-1])
        if runs and (both := runs[-1].joined(run)).saved and both.saved >= runs[-1].saved + run.saved:
            runs[-1] = both
        else:
            runs.append(run)
    return [list(run.header) if run.saved else [] for run in runs for _ in range(run.num_prompts)]


class Headers:
    """The headers of prompts, in the order in which they are decoded; the last one that was read is kept."""

    def __init__(self, model: EnsembleForCausalLM, prompts: Sequence[EncodedPrompt], chunk: int | None = None) -> None:
        planned = plan_headers([prompt.ids for prompt in prompts])
        self._planned = {prompt.number: header for prompt, header in zip(prompts, planned, strict=True)}
        self._model = model
        self._chunk = chunk
        self._ids: list[int] = []
        self._cache: RowCache | None = None

    def fill(self, cache: RowCache, rows: Sequence[Row], first: int) -> None:
        """Write the headers of new `rows` into `cache`, where they stand from row `first` on."""
        for place, row in enumerate(rows, start=first):
            header = self._planned.get(row.texts[0].prompt)
            if header:
                cache.copy_rows([0], [place], len(header), self._read(header))
                row.num_read = len(header)

    def _read(self, header: list[int]) -> RowCache:
        """A cache of one row that holds the header."""
        if self._cache is None or self._ids != header:
            self._cache = None  # before the next is read: not both in memory
            cache = RowCache((forward.roles for forward in self._model.member_set.forwards), 1, len(header))
            positions = torch.arange(len(header))[None]
            read_in_chunks(self._model.member_set.logits, cache, torch.tensor([header]), positions, self._chunk)
            cache.hold([header], [len(header)])
            self._ids, self._cache = header, cache
        return self._cache


_INF = float("inf")


class TextLimits(Protocol):
    """The limits of an ensemble's texts: its end tokens and its context. A model has them, and an engine around it."""

    config: Any
    generation_config: Any

    @property
    def shortest_context(self) -> tuple[str, int] | None:
        """The role of the shortest context, and that limit of a text with its answer in tokens; None without any."""


def make_batches(
    model: EnsembleForCausalLM, prompts: Sequence[EncodedPrompt], batch_size: int, max_new_tokens: int
) -> list[list[EncodedPrompt]]:
    """Return `batches_by_length`, with prompts that leave less room than `max_new_tokens` in the context alone."""
    context = model.shortest_context
    return batches_by_length(prompts, batch_size, longest=_INF if context is None else context[1] - max_new_tokens)


def batches_by_length(
    prompts: Sequence[EncodedPrompt], batch_size: int, *, longest: float = _INF
) -> list[list[EncodedPrompt]]:
    """Return batches of prompts of similar length, the longest first: too little memory then shows at once.

    Prompts of more than `longest` tokens, to which the context leaves less room than was asked for, are batches of
    their own: the room of one must not cut the others short.
    """
    ordered = sorted(prompts, key=lambda prompt: (-len(prompt.ids), prompt.number))
    tight = [[prompt] for prompt in ordered if len(prompt.ids) > longest]
    others = ordered[len(tight) :]
    return tight + [others[start : start + batch_size] for start in range(0, len(others), batch_size)]


def room_for(model: TextLimits, num_tokens: int, max_new_tokens: int) -> int:
    """Return how many tokens fit behind prompts of `num_tokens`: `max_new_tokens`, or what the context leaves."""
    context = model.shortest_context
    return max_new_tokens if context is None else min(max_new_tokens, context[1] - num_tokens)


def pad_left(rows: Sequence[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Return ids and mask, both (rows, longest) int64."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def end_ids(model: TextLimits) -> frozenset[int]:
    """The ids that end a text."""
    ends = model.generation_config.eos_token_id
    return frozenset([] if ends is None else ends if isinstance(ends, list) else [ends])


def pad_id(model: EnsembleForCausalLM, tokenizer: Any) -> int:
    """Any id will do where the mask is 0; the end token is what transformers takes by itself."""
    candidates = (model.generation_config.pad_token_id, tokenizer.pad_token_id, *end_ids(model), 0)
    return int(next(token for token in candidates if token is not None))


@contextmanager
def ends_only(model: EnsembleForCausalLM) -> Iterator[None]:
    """Leave only the special ids of the generation config: what else a model's authors like there is not asked for."""
    own = model.generation_config
    ids = {name: getattr(own, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids)
    try:
        yield
    finally:
        model.generation_config = own
