"""Outputs of decoding: the texts of a grid, and tokens as they come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from ensembler.decoding.rows import Row, Text


@dataclass(frozen=True)
class GridOutput:
    """The output of `generate` for a grid.

    `sequences` (points, prompts · samples, positions) int64: prompts and texts as `generate` returns them for each
    point, padded behind their ends; `lengths` (points, prompts · samples) int64 count their positions up to there.
    `rows_per_step`: how many different texts each forward of the members served.
    """

    sequences: Tensor
    lengths: Tensor
    rows_per_step: tuple[int, ...]


class Stream:
    """Hands tokens to a streamer, position by position, as soon as every running text has them."""

    def __init__(self, streamer: BaseStreamer | None, texts: Sequence[Text], pad: int = 0) -> None:
        self._streamer = streamer
        self._texts = texts
        self._pad = pad
        self._num = 0

    def go_on(self, rows: Sequence[Row]) -> None:
        """Hand on what is new on `rows`; of texts that have ended, padding."""
        if self._streamer is None:
            return
        running = {text: row.new_ids for row in rows for text in row.texts}
        texts = [running.get(text, text.ids) for text in self._texts]
        ready = min((len(ids) for ids in running.values()), default=max(map(len, texts)))
        for position in range(self._num, ready):
            tokens = [ids[position] if position < len(ids) else self._pad for ids in texts]
            self._streamer.put(torch.tensor(tokens))
        self._num = max(ready, self._num)
        if not running:
            self._streamer.end()
