"""Decode many prompts: one after another in the rows of the decode loop, or in padded batches for `generate`.

A text depends on its prompt, the options and the seed alone; neither on its neighbours nor on the order. What prompts
begin with in common is read once.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig

from ensembler.decoding.choosing import Processors
from ensembler.decoding.decoder import Decoder, grid_of, make_seed
from ensembler.decoding.decoding_options import DecodingOptions
from ensembler.decoding.prompts import EncodedPrompt
from ensembler.decoding.rows import Row, Text
from ensembler.decoding.samples import StopChecker, StopInNewText, Stream
from ensembler.engine.prefill import prefill
from ensembler.engine.row_cache import RowCache, common_length
from ensembler.modeling import EnsembleForCausalLM
from ensembler.vocab import end_ids

MIN_SHARED = 32  # tokens: below, a forward of its own costs about what it saves


def plan_prefixes(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return for each prompt, as ids, the prefix that is read once for it and its neighbours, or [].

    Every prompt keeps at least one token behind its prefix. Neighbours share a prefix where that saves more positions
    than prefixes of their own.
    """
    runs: list[tuple[Sequence[int], int]] = []  # prefixes, and how many prompts begin with each
    for ids in prompts:
        if runs:
            prefix, num = runs[-1]
            shared = prefix[: common_length([prefix, ids[:-1]])]
            if _num_saved(shared, num + 1) >= max(_num_saved(prefix, num), 1):
                runs[-1] = shared, num + 1
                continue
        runs.append((ids[:-1], 1))
    return [list(prefix) if _num_saved(prefix, num) else [] for prefix, num in runs for _ in range(num)]


def _num_saved(prefix: Sequence[int], num_prompts: int) -> int:
    """Return the number of positions that are not read again; 0 where it is not worth it."""
    return (num_prompts - 1) * len(prefix) if len(prefix) >= MIN_SHARED else 0


class PrefixCache:
    """The shared prefixes of prompts, in the order in which they are decoded; the last one that was read is kept."""

    def __init__(self, model: EnsembleForCausalLM, prompts: Sequence[EncodedPrompt], chunk: int | None = None) -> None:
        planned = plan_prefixes([prompt.ids for prompt in prompts])
        self._planned = {prompt.number: prefix for prompt, prefix in zip(prompts, planned, strict=True)}
        self._model = model
        self._chunk = chunk
        self._cache: RowCache | None = None

    def fill(self, cache: RowCache, rows: Sequence[Row], first: int) -> None:
        """Write the prefixes of new `rows` into `cache`, where they stand from row `first` on."""
        for index, row in enumerate(rows, start=first):
            prefix = self._planned.get(row.texts[0].prompt)
            if prefix and cache.is_unscaled(len(row.ids)):
                cache.copy_rows([0], [index], len(prefix), self._read(prefix))
                row.num_read = len(prefix)

    def _read(self, prefix: list[int]) -> RowCache:
        """Return a cache of one row that holds the prefix."""
        if self._cache is None or self._cache.texts[0] != prefix:
            self._cache = None  # before the next is read: not both in memory
            cache = self._model.member_set.new_row_cache(1, len(prefix))
            positions = torch.arange(len(prefix))[None]
            prefill(self._model.member_set.logits, cache, torch.tensor([prefix]), positions, self._chunk)
            cache.hold([prefix], [len(prefix)])
            self._cache = cache
        return self._cache


class TextLimits(Protocol):
    """The limits of an ensemble's texts: its end tokens and its context. A model has them, and an engine around it."""

    @property
    def config(self) -> Any:
        """The configuration of the ensemble."""

    @property
    def generation_config(self) -> Any:
        """The generation config of the ensemble, or None."""

    @property
    def shortest_context(self) -> tuple[str, int] | None:
        """The role of the shortest context, and that limit of a text with its answer in tokens; None without any."""


def longest_first(prompts: Sequence[EncodedPrompt]) -> list[EncodedPrompt]:
    """Return the prompts by length, the longest first: too little memory then shows at once."""
    return sorted(prompts, key=lambda prompt: (-len(prompt.ids), prompt.number))


def batches_by_length(
    model: TextLimits, prompts: Sequence[EncodedPrompt], batch_size: int, max_new_tokens: int
) -> list[list[EncodedPrompt]]:
    """Return batches of prompts of similar length, the longest first.

    Prompts to which the context leaves less room than `max_new_tokens` are batches of their own: the room of one must
    not cut the others short.
    """
    ordered = longest_first(prompts)
    tight = [[one] for one in ordered if room_for(model, len(one.ids), max_new_tokens) < max_new_tokens]
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


def pad_id(model: EnsembleForCausalLM, tokenizer: Any) -> int:
    """Any id that all members can read will do where the mask is 0; transformers takes the end token by itself."""
    settings = model.generation_config
    return model.contract.padding_id(settings.pad_token_id, tokenizer.pad_token_id, *end_ids(settings))


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


@dataclass(frozen=True)
class Decoded:
    """A prompt and its texts: `ids` of the new tokens by point and sample; the seconds since it began."""

    prompt: EncodedPrompt
    ids: list[list[list[int]]]
    seconds: float


@torch.no_grad()
def decode_queue(
    model: EnsembleForCausalLM,
    tokenizer: Any,
    prompts: Sequence[EncodedPrompt],
    options: DecodingOptions,
    decoder: Decoder,
    num_together: int,
    *,
    cache: RowCache | None = None,
    share_prefixes: bool = True,
) -> Iterator[Decoded]:
    """Yield prompts as their texts are complete; at most `num_together` are decoded at a time, the longest begin.

    `decoder` says who drafts, at which points. `cache`: that of a conversation, of which the single prompt is the next
    turn. `share_prefixes`: read what prompts begin with in common once.
    """
    if not prompts:
        return
    grid, num_samples = grid_of(model, decoder.points, 1), options.num_return_sequences
    ordered = longest_first(prompts)
    waiting: deque[tuple[EncodedPrompt, Row]] = deque()
    for prompt in ordered:  # all its texts begin on one row
        texts = [Text(point, prompt.number, sample) for point in range(len(grid)) for sample in range(num_samples)]
        num = len(prompt.ids)
        row = Row(list(prompt.ids), num, num + room_for(model, num, options.max_new_tokens), texts, prompt.ids)
        row.num_read = 0 if cache is None else cache.num_held(0, prompt.ids)
        waiting.append((prompt, row))
    own = cache
    if own is None:
        room = max(row.limit for _, row in waiting)
        own = model.member_set.row_cache(min(num_together, len(ordered)), room, len(ordered[0].ids))
    prefixes = PrefixCache(model, ordered if share_prefixes else [], options.prefill_chunk)
    stops = [StopInNewText(tokenizer, options.stop, 0)] if options.stop else []
    loop = decoder.make_loop(
        model,
        grid,
        Processors(options.processors()),
        make_seed(options.seed) if options.temperature > 0 else None,
        StopChecker(end_ids(model.generation_config), stops, whole=False),
        own,
        chunk=options.prefill_chunk,
        keeps_rows=cache is not None,
    )
    running: dict[int, tuple[EncodedPrompt, list[Text], float]] = {}
    stream = Stream(decoder.streamer, [text for _, row in waiting for text in row.texts])
    if decoder.streamer is not None:
        decoder.streamer.put(torch.tensor([ordered[0].ids]))
    while waiting or running:
        ended: list[Text] = []
        if waiting and len(running) < num_together:
            new = [waiting.popleft() for _ in range(min(len(waiting), num_together - len(running)))]
            rows = [row for _, row in new]
            running |= {prompt.number: (prompt, list(row.texts), time.perf_counter()) for prompt, row in new}
            own.reserve(len(loop.rows) + len(rows), max(len(row.ids) for row in rows))
            prefixes.fill(own, rows, len(loop.rows))
            ended = loop.add(rows)
        elif loop.room:
            ended = decoder.run(loop)
        stream.go_on(loop.rows)
        for number in {text.prompt for text in ended}:
            prompt, texts, start = running[number]
            if all(text.has_ended for text in texts):
                del running[number]
                ids = [text.ids for text in texts]
                by_point = [ids[first : first + num_samples] for first in range(0, len(ids), num_samples)]
                yield Decoded(prompt, by_point, time.perf_counter() - start)
    if cache is None:
        model.member_set.keep(own)
