"""The next token of every text of a grid, from one set of the members' logits.

Sampling takes argmax(scores + noise), the noise being Gumbel's: a draw from softmax(scores). The noise of a token
depends on (seed, prompt, sample, position, token) alone, and neither on the row nor on the batch nor on the point. So
a text is drawn the same way whatever is decoded beside it. Points share the noise, and so draw the same token wherever
their distributions are alike, which keeps rows few and differences between points less noisy. (By inverse CDF, a
little more probability of a token moves the shares of all that follow.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from ensembler_kernels import combine, torch_gumbel
from torch import Tensor
from transformers import LogitsProcessorList

from ensembler.decoding.points import Setting
from ensembler.decoding.tracks import ENDED


class Noise:
    """The noise of each stream: `prompts` and `samples` (streams,) int64 say which prompt and which sample of it."""

    def __init__(self, seed: int, prompts: Tensor, samples: Tensor) -> None:
        self._seed = seed
        self._streams = torch.stack([samples, prompts], dim=-1)
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


class Chooser:
    """Greedy decoding, or sampling where `noise` is given, of all tracks."""

    def __init__(self, settings: Sequence[Setting], processors: LogitsProcessorList, noise: Noise | None) -> None:
        self._settings = settings
        self._processors = processors
        self._noise = noise

    def choose(self, logits: Mapping[str, Tensor], ids: Tensor, row_of: Tensor) -> Tensor:
        """Return the next token of each track, (points, streams) int64 on the CPU; ENDED where it has none.

        `logits` (rows, V_member) by role, `ids` (rows, positions); `row_of` as in Tracks.
        """
        if self._noise is not None:
            self._noise.next_position()
        running = [(rows != ENDED).nonzero().flatten() for rows in row_of]
        chosen = [
            self._choose_at(setting, logits, ids, rows[streams], streams)
            for setting, rows, streams in zip(self._settings, row_of, running, strict=True)
            if streams.numel()
        ]
        tokens = torch.full_like(row_of, ENDED)
        tokens[row_of != ENDED] = torch.cat(chosen).cpu()
        return tokens

    def _choose_at(
        self, setting: Setting, logits: Mapping[str, Tensor], ids: Tensor, rows: Tensor, streams: Tensor
    ) -> Tensor:
        """The tokens of one point for its running streams, which are on `rows`, both (n,)."""
        distinct, inverse = torch.unique(rows, return_inverse=True)
        is_all = distinct.shape[0] == ids.shape[0]
        picked = distinct.to(ids.device)
        here = [logits[role] if is_all else logits[role][picked.to(logits[role].device)] for role in setting.roles]
        scores: Tensor = self._processors(ids if is_all else ids[picked], combine(here, setting.how, setting.alpha))
        if self._noise is None:
            return scores.argmax(-1)[inverse]
        return self._noise.choose(scores[inverse], streams)
