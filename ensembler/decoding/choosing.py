"""The next token of every text of a grid, from one set of the members' logits.

Sampling takes argmax(scores + noise), the noise being Gumbel's: a draw from softmax(scores). The noise of a token
depends on (seed, prompt, sample, position, token) alone, and neither on the row nor on the batch nor on the point. So
a text is drawn the same way whatever is decoded beside it. Points share the noise, and so draw the same token wherever
their distributions are alike, which keeps rows few and differences between points less noisy. (By inverse CDF, a
little more probability of a token moves the shares of all that follow.)
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy

import torch
from ensembler_kernels import Combination, Weights, combine, combine_sample, make_noise
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process

from ensembler.decoding.points import Grid
from ensembler.decoding.tracks import ENDED, Tracks

# These know a row by its number, keep a state from call to call, or run the model themselves.
NOT_BY_ROW = (
    logits_process.EncoderNoRepeatNGramLogitsProcessor,
    logits_process.EncoderRepetitionPenaltyLogitsProcessor,
    logits_process.PrefixConstrainedLogitsProcessor,
    logits_process.SynthIDTextWatermarkLogitsProcessor,
    logits_process.UnbatchedClassifierFreeGuidanceLogitsProcessor,
)


class Noise:
    """The noise of each stream: `prompts` and `samples` (streams,) int64 say which prompt and which sample of it."""

    def __init__(self, seed: int, prompts: Tensor, samples: Tensor) -> None:
        self._noise = make_noise(seed, prompts, samples)
        self._noise[:, 3] = -1

    def next_position(self) -> None:
        """Go on to the next token."""
        self._noise[:, 3] += 1

    def of(self, streams: Tensor, device: torch.device) -> Tensor:
        """Return seed, prompt, sample and position of streams (n,), (n, 4) int64."""
        return self._noise[streams].to(device)


class Processors:
    """The processors that `generate` made for a batch, for rows of it in any order.

    One of them may know how much padding stands before each prompt; `first` picks the prompts' rows of the batch.
    """

    def __init__(self, processors: LogitsProcessorList, first: slice) -> None:
        self._processors = LogitsProcessorList(copy(processor) for processor in processors)
        self._padding = [
            (processor, processor.prompt_ignore_length[first])
            for processor in self._processors
            if isinstance(getattr(processor, "prompt_ignore_length", None), Tensor)
        ]

    def __bool__(self) -> bool:
        return bool(self._processors)

    def __call__(self, ids: Tensor, scores: Tensor, prompts: Tensor) -> Tensor:
        """Return the scores (rows, V) of rows with texts `ids` (rows, positions), which are of `prompts` (rows,)."""
        for processor, lengths in self._padding:
            processor.prompt_ignore_length = lengths[prompts.to(lengths.device)]
        processed: Tensor = self._processors(ids, scores)
        return processed


_SCORES = Combination((1.0,), (0.0,))  # processed scores stand for themselves
_MOST = 64  # rows of scores that processors are given at once: bounds memory, and what leaves a core's cache


class Chooser:
    """Greedy decoding, or sampling where `noise` is given, of all tracks."""

    def __init__(self, grid: Grid, processors: Processors, noise: Noise | None) -> None:
        self._grid = grid
        self._processors = processors
        self._noise = noise
        self._scores = Weights.of((_SCORES, 0.0), device=grid.weights.table.device)

    def choose(self, logits: Mapping[str, Tensor], ids: Tensor, tracks: Tracks) -> Tensor:
        """Return the next token of each track, (points, streams) int64 on the CPU; ENDED where it has none.

        `logits` (rows, V_member) by role, `ids` (rows, positions). Without processors, one launch chooses all tokens.
        """
        if self._noise is not None:
            self._noise.next_position()
        runs = tracks.row_of != ENDED
        points, streams = runs.nonzero().unbind(-1)
        rows = tracks.row_of[runs]
        ordered = self._grid.ordered(logits)
        if self._processors:
            chosen = self._choose_processed(ordered, ids, points, streams, rows, tracks)
        else:
            chosen = self._choose_among(ordered, self._weights(points), rows, streams)
        tokens = torch.full_like(tracks.row_of, ENDED)
        tokens[runs] = chosen.cpu()
        return tokens

    def _weights(self, points: Tensor) -> Weights:
        table = self._grid.weights.table
        return self._grid.weights.replace_table(table[points.to(table.device)])

    def _choose_among(self, logits: list[Tensor], weights: Weights, rows: Tensor, streams: Tensor) -> Tensor:
        """The tokens of outputs that read `rows`, each with the noise of its stream."""
        device = logits[0].device
        noise = None if self._noise is None else self._noise.of(streams, device)
        tokens = combine_sample(logits, weights, rows.to(device, torch.int32), noise=noise).tokens
        return tokens.clamp_(min=0)  # where processors forbid everything transformers takes the first token, too

    def _choose_processed(
        self, logits: list[Tensor], ids: Tensor, points: Tensor, streams: Tensor, rows: Tensor, tracks: Tracks
    ) -> Tensor:
        """The same by way of scores, which are made and processed once for the tracks of a point on one row."""
        pairs, which = torch.unique(torch.stack([points, rows], dim=-1), dim=0, return_inverse=True)
        prompts = torch.empty(pairs.shape[0], dtype=torch.int64).scatter_(0, which, tracks.prompt_of[streams])
        chosen = torch.empty(rows.shape, dtype=torch.int64, device=ids.device)
        for start in range(0, pairs.shape[0], _MOST):
            here = slice(start, start + _MOST)
            of_point, of_row = pairs[here].unbind(-1)
            z = combine(logits, self._weights(of_point), of_row.to(ids.device, torch.int32))
            scores = self._processors(ids[of_row.to(ids.device)], z, prompts[here])
            inside = ((which >= start) & (which < start + _MOST)).nonzero().squeeze(-1)
            found = self._choose_among([scores.float()], self._scores, which[inside] - start, streams[inside])
            chosen[inside.to(ids.device)] = found
        return chosen
