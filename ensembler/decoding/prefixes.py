"""Prompts that begin alike: what they share is read once, and its keys and values are copied into their rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

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
