"""The next token of every text of a grid, from one set of the members' logits.

Sampling takes argmax(scores + noise), the noise being Gumbel's: a draw from softmax(scores). The noise of a token
depends on (seed, prompt, sample, position, token) alone, and neither on the row nor on the batch nor on the point. So
a text is drawn the same way whatever is decoded beside it. Points share the noise, and so draw the same token wherever
their distributions are alike, which keeps rows few and differences between points less noisy. (By inverse CDF, a
little more probability of a token moves the shares of all that follow.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy

import torch
from ensembler_kernels import combine, torch_gumbel
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process

from ensembler.decoding.points import RulePoints
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
        self._seed = seed
        self._streams = torch.stack([samples, prompts], dim=-1) & 0xFFFFFFFF  # a counter has words of 32 bits
        self._dense: dict[int, Tensor] = {}
        self._position = -1

    def next_position(self) -> None:
        """Go on to the next token."""
        self._position += 1
        self._dense.clear()

    def choose(self, scores: Tensor, streams: Tensor) -> Tensor:
        """Return argmax(scores + noise) (n,) of scores (n, V), each by the noise of a stream (n,)."""
        may = scores >= scores.amax(-1, keepdim=True) - torch_gumbel.SPREAD
        if int(may.sum()) * 4 > may.numel():  # four tokens share a block of the generator
            return (scores + self._all(streams, scores)).argmax(-1)
        row, token = may.nonzero(as_tuple=True)
        counters = self._counters(streams).to(scores.device)
        drawn = torch.full_like(scores, -torch.inf)
        drawn[row, token] = scores[row, token] + torch_gumbel.noise_at(self._seed, counters[row], token)
        return drawn.argmax(-1)

    def _all(self, streams: Tensor, like: Tensor) -> Tensor:
        """The noise of all tokens, made once for all points: stream by stream, which stays in a core's cache."""
        width = like.shape[-1]
        for stream in streams.tolist():
            if stream not in self._dense or self._dense[stream].shape[-1] < width:
                counters = self._counters(torch.tensor([stream])).to(like.device)
                self._dense[stream] = torch_gumbel.noise(self._seed, counters, width)[0]
        return torch.stack([self._dense[stream][:width] for stream in streams.tolist()])

    def _counters(self, streams: Tensor) -> Tensor:
        return torch.nn.functional.pad(self._streams[streams], (1, 0), value=self._position)


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

    def __call__(self, ids: Tensor, scores: Tensor, prompts: Tensor) -> Tensor:
        """Return the scores (rows, V) of rows with texts `ids` (rows, positions), which are of `prompts` (rows,)."""
        for processor, lengths in self._padding:
            processor.prompt_ignore_length = lengths[prompts.to(lengths.device)]
        processed: Tensor = self._processors(ids, scores)
        return processed


class Chooser:
    """Greedy decoding, or sampling where `noise` is given, of all tracks."""

    def __init__(self, points: Sequence[RulePoints], processors: Processors, noise: Noise | None) -> None:
        self._points = [
            (index, of_rule, alpha)
            for of_rule in points
            for index, alpha in zip(of_rule.indices, of_rule.alphas, strict=True)
        ]
        self._points.sort(key=lambda point: point[0])  # as the tracks are
        self._processors = processors
        self._noise = noise

    def choose(self, logits: Mapping[str, Tensor], ids: Tensor, tracks: Tracks) -> Tensor:
        """Return the next token of each track, (points, streams) int64 on the CPU; ENDED where it has none.

        `logits` (rows, V_member) by role, `ids` (rows, positions).
        """
        if self._noise is not None:
            self._noise.next_position()
        runs = tracks.row_of != ENDED
        chosen = [
            self._choose_at(point, of_rule, alpha, logits, ids, tracks)
            for point, of_rule, alpha in self._points
            if runs[point].any()
        ]
        tokens = torch.full_like(tracks.row_of, ENDED)
        tokens[runs] = torch.cat(chosen).cpu()
        return tokens

    def _choose_at(
        self, point: int, of_rule: RulePoints, alpha: float, logits: Mapping[str, Tensor], ids: Tensor, tracks: Tracks
    ) -> Tensor:
        """The tokens of one point for its running streams."""
        streams = (tracks.row_of[point] != ENDED).nonzero().flatten()
        rows, inverse = torch.unique(tracks.row_of[point, streams], return_inverse=True)
        prompts = torch.empty_like(rows).scatter_(0, inverse, tracks.prompt_of[streams])
        here: Tensor | slice = slice(None) if rows.shape[0] == ids.shape[0] else rows.to(ids.device)  # a view of all
        z = combine([logits[role][here] for role in of_rule.roles], of_rule.how, alpha)
        scores = self._processors(ids[here], z, prompts)
        inverse = inverse.to(scores.device)
        if self._noise is None:
            return scores.argmax(-1)[inverse]
        return self._noise.choose(scores[inverse], streams)
