"""Prompts that wait for a place in the decode loop: when the texts of one have ended, the next begins at once.

A text depends on its prompt, the options and the seed alone; neither on its neighbours nor on the order. What prompts
begin with in common is read once.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ensembler.decoding.choosing import Processors
from ensembler.decoding.decoder import Decoder, grid_of
from ensembler.decoding.decoding_options import DecodingOptions
from ensembler.decoding.prompt_batches import Headers, end_ids, room_for
from ensembler.decoding.prompts import EncodedPrompt
from ensembler.decoding.rows import Row, Text
from ensembler.decoding.samples import Ends, StopInNewText, Stream
from ensembler.engine.row_cache import RowCache
from ensembler.modeling import EnsembleForCausalLM


@dataclass(frozen=True)
class Decoded:
    """A prompt and its texts: `ids` of the new tokens by point and sample; the seconds since it got its place."""

    prompt: EncodedPrompt
    ids: list[list[list[int]]]
    seconds: float


class PromptQueue:
    """Decodes prompts, at most `num_together` at a time. `decoder` says who drafts, at which points, and is kept.

    `cache`: that of a conversation, of which the single prompt is the next turn. `share_headers`: read what prompts
    begin with in common once.
    """

    def __init__(
        self,
        model: EnsembleForCausalLM,
        tokenizer: Any,
        options: DecodingOptions,
        decoder: Decoder,
        *,
        num_together: int,
        cache: RowCache | None = None,
        share_headers: bool = True,
    ) -> None:
        self._model = model
        self._options = options
        self._decoder = decoder
        self._num_together = num_together
        self._cache = cache
        self._share_headers = share_headers
        grid = grid_of(model, decoder.points, 1)
        self._grid = grid
        self._num_points = len(grid)
        self._seed = None
        if options.temperature > 0:
            self._seed = int(torch.randint(2**63 - 1, ())) if options.seed is None else options.seed
        stops = [StopInNewText(tokenizer, options.stop, 0)] if options.stop else []
        self._ends = Ends(end_ids(model), stops, whole=False)

    @torch.no_grad()
    def run(self, prompts: Sequence[EncodedPrompt]) -> Iterator[Decoded]:
        """Yield prompts as their texts are complete: the longest begin, so that too little memory shows at once."""
        if not prompts:
            return
        ordered = sorted(prompts, key=lambda prompt: (-len(prompt.ids), prompt.number))
        waiting = deque(self._row(prompt) for prompt in ordered)
        by_number = {prompt.number: prompt for prompt in prompts}
        num_rows, room = min(self._num_together, len(ordered)), max(row.limit for row in waiting)
        longest, members = len(ordered[0].ids), self._model.member_set
        cache = members.row_cache(num_rows, room, longest) if self._cache is None else self._cache
        headers = Headers(self._model, ordered if self._share_headers else [], self._options.prefill_chunk)
        loop = self._decoder.make_loop(
            self._model,
            self._grid,
            Processors(self._options.processors()),
            self._seed,
            self._ends,
            cache,
            chunk=self._options.prefill_chunk,
            keeps_rows=self._cache is not None,
        )
        running: dict[int, tuple[float, list[Text]]] = {}
        stream = Stream(self._decoder.streamer, [text for row in waiting for text in row.texts])
        if self._decoder.streamer is not None:
            self._decoder.streamer.put(torch.tensor([ordered[0].ids]))
        while waiting or running:
            ended: list[Text] = []
            if waiting and len(running) < self._num_together:
                new = [waiting.popleft() for _ in range(min(len(waiting), self._num_together - len(running)))]
                running |= {row.texts[0].prompt: (time.perf_counter(), list(row.texts)) for row in new}
                cache.reserve(len(loop.rows) + len(new), max(len(row.ids) for row in new))
                headers.fill(cache, new, len(loop.rows))
                ended = loop.add(new)
            elif loop.room:
                ended = self._decoder.run(loop)
            stream.go_on(loop.rows)
            for number in {text.prompt for text in ended}:
                start, texts = running[number]
                if all(text.has_ended for text in texts):
                    del running[number]
                    yield Decoded(by_number[number], self._by_point(texts), time.perf_counter() - start)
        if self._cache is None:
            members.keep(cache)

    def _row(self, prompt: EncodedPrompt) -> Row:
        """All texts of a prompt begin on one row."""
        texts = [
            Text(point, prompt.number, sample)
            for point in range(self._num_points)
            for sample in range(self._options.num_return_sequences)
        ]
        num_prompt = len(prompt.ids)
        limit = num_prompt + room_for(self._model, num_prompt, self._options.max_new_tokens)
        row = Row(list(prompt.ids), num_prompt, limit, texts, prompt.ids)
        if self._cache is not None:
            row.num_read = self._cache.num_held(0, prompt.ids)
        return row

    def _by_point(self, texts: Sequence[Text]) -> list[list[list[int]]]:
        num = self._options.num_return_sequences
        ids = [text.ids for text in texts]
        return [ids[point * num : (point + 1) * num] for point in range(self._num_points)]
