"""Texts of a batch that grow by different numbers of tokens: ids, lengths, ends, and the streamer that follows them.

Processors and stopping criteria are given each row's text as plain decoding gives it: the padded prompt of the batch,
and the row's own new tokens. Rows of different length take one call for each length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from ensembler.decoding.choosing import Processors


class DraftedTexts:
    """`prompts` (rows, positions) int64, padded on the left; `max_length` positions are the most of a text.

    `running` holds the numbers of the rows that have not ended. Behind a row's end there may be drafted tokens.
    """

    def __init__(self, prompts: Tensor, max_length: int, pad: int, streamer: BaseStreamer | None) -> None:
        num_rows, self._prompt_length = prompts.shape
        room = max_length - self._prompt_length
        self._ids = torch.nn.functional.pad(prompts, (0, room), value=pad)
        self._lengths = [self._prompt_length] * num_rows
        self._max_length = max_length
        self._pad = pad
        self._streamer = streamer
        self._num_streamed = 0
        self.running = list(range(num_rows))
        self._every_row = torch.arange(num_rows)

    @property
    def num_new(self) -> list[int]:
        """The number of new tokens of every row."""
        return [length - self._prompt_length for length in self._lengths]

    @property
    def room(self) -> int:
        """How many tokens all running rows may still get."""
        return self._max_length - max(self._lengths[row] for row in self.running)

    def positions(self, rows: Sequence[int], offset: int) -> list[int]:
        """The places among the new tokens of those at `offset` behind each row's end."""
        return [self._lengths[row] - self._prompt_length + offset for row in rows]

    def text(self, row: int) -> Tensor:
        """A row so far, (positions,)."""
        return self._ids[row, : self._lengths[row]]

    def newest(self, num: int) -> Tensor:
        """Return the last token and the `num` − 1 drafted ones behind it of every running row, (running, num)."""
        return self._gather(self.running, -1, num)

    def drafted(self, rows: Sequence[int], offset: int) -> Tensor:
        """The drafted token at `offset` of each row, (n,), a copy."""
        return self._gather(rows, offset, 1)[:, 0].clone()

    def write(self, rows: Sequence[int], offset: int, tokens: Tensor) -> None:
        """Put a token (n,) at `offset` behind the end of each row."""
        device = self._ids.device
        end = self._common_end(rows)
        if end is not None:
            self._ids[:, end + offset] = tokens.to(device)
            return
        places = torch.tensor([self._lengths[row] + offset for row in rows], device=device)
        self._ids[torch.tensor(rows, device=device), places] = tokens.to(device)

    def process(self, processors: Processors, scores: Tensor, rows: Sequence[int], offset: int) -> Tensor:
        """Return the processed scores (n, V) of the tokens at `offset` behind the ends of `rows` (n,)."""
        end = self._common_end(rows)
        if end is not None:
            return processors(self._ids[:, : end + offset], scores, self._every_row)
        parts = [
            (places, processors(self._ids_of(rows, places, length + offset), _of(scores, places, rows), numbers))
            for length, places, numbers in self._by_length(rows)
        ]
        processed = torch.empty_like(scores)
        for places, part in parts:
            processed[places.to(scores.device)] = part
        return processed

    def ended(self, criteria: StoppingCriteriaList, rows: Sequence[int], offset: int) -> Tensor:
        """Whether each text (n,) ends with its token at `offset`, bool."""
        end = self._common_end(rows)
        if end is not None:
            ended: Tensor = criteria(self._ids[:, : end + offset + 1], None)
            return ended
        found = torch.empty(len(rows), dtype=torch.bool, device=self._ids.device)
        for length, places, _ in self._by_length(rows):
            found[places.to(found.device)] = criteria(self._ids_of(rows, places, length + offset + 1), None)
        return found

    def grow(self, gained: Sequence[int], goes_on: Sequence[int]) -> None:
        """Take `gained` tokens behind the end of each running row into its text; places not in `goes_on` have ended."""
        for row, num in zip(self.running, gained, strict=True):
            self._lengths[row] += num
        self.running = [self.running[place] for place in goes_on]
        self._stream()

    def sequences(self) -> Tensor:
        """Return prompts and texts (rows, positions), padded behind their ends, as `generate` does."""
        places = torch.arange(max(self._lengths), device=self._ids.device)
        lengths = torch.tensor(self._lengths, device=self._ids.device)
        return self._ids[:, : places.shape[0]].masked_fill(places >= lengths[:, None], self._pad)

    def _stream(self) -> None:
        """Hand on what every running row has; of rows that have ended, padding."""
        if self._streamer is None:
            return
        counts = self.num_new
        ready = min((counts[row] for row in self.running), default=max(counts))
        if ready > self._num_streamed:
            columns = self.sequences()[:, self._prompt_length :].cpu()
            for place in range(self._num_streamed, ready):
                self._streamer.put(columns[:, place])
            self._num_streamed = ready
        if not self.running:
            self._streamer.end()

    def _common_end(self, rows: Sequence[int]) -> int | None:
        """Where all texts end, if `rows` are all and end together: then a slice does, and no index has to be made."""
        end = self._lengths[0]
        return end if len(rows) == len(self._lengths) and all(length == end for length in self._lengths) else None

    def _gather(self, rows: Sequence[int], offset: int, num: int) -> Tensor:
        device = self._ids.device
        end = self._common_end(rows)
        if end is not None:
            return self._ids[:, end + offset : end + offset + num]
        starts = torch.tensor([self._lengths[row] + offset for row in rows], device=device)
        return self._ids[torch.tensor(rows, device=device)[:, None], starts[:, None] + torch.arange(num, device=device)]

    def _ids_of(self, rows: Sequence[int], places: Tensor, length: int) -> Tensor:
        numbers = [rows[place] for place in places.tolist()]
        return self._ids[torch.tensor(numbers, device=self._ids.device), :length]

    def _by_length(self, rows: Sequence[int]) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield each length with the places in `rows` that have it, and their rows."""
        lengths = [self._lengths[row] for row in rows]
        for length in sorted(set(lengths)):
            places = [place for place, found in enumerate(lengths) if found == length]
            yield length, torch.tensor(places), torch.tensor([rows[place] for place in places])


def _of(scores: Tensor, places: Tensor, rows: Sequence[int]) -> Tensor:
    return scores if places.shape[0] == len(rows) else scores[places.to(scores.device)]
