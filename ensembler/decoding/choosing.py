"""The next token of every text, from one set of the members' logits.

Sampling takes argmax(scores + noise), the noise being Gumbel's: a draw from softmax(scores). The noise of a token
depends on (seed, prompt, sample, position, token) alone: neither on the row, the batch or the point, nor on what was
drafted. So a text is drawn the same way whatever is decoded beside it. Points share the noise, and so draw the same
token wherever their distributions are alike, which keeps rows few and differences between points less noisy. (By
inverse CDF, a little more probability of a token moves the shares of all that follow.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from ensembler_kernels import Combination, Weights, combine, combine_sample, make_noise
from ensembler_kernels.reference import gumbel
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process

from ensembler.decoding.rows import Row, Text
from ensembler.engine.devices import send
from ensembler.engine.grid import Grid

# These know a row by its number, keep a state from call to call, or run the model themselves.
NOT_BY_ROW = (
    logits_process.EncoderNoRepeatNGramLogitsProcessor,
    logits_process.EncoderRepetitionPenaltyLogitsProcessor,
    logits_process.PrefixConstrainedLogitsProcessor,
    logits_process.SynthIDTextWatermarkLogitsProcessor,
    logits_process.UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
# These look at scores alone: no text has to be written down for them.
_BLIND = (
    logits_process.EpsilonLogitsWarper,
    logits_process.EtaLogitsWarper,
    logits_process.InfNanRemoveLogitsProcessor,
    logits_process.LogitNormalization,
    logits_process.MinPLogitsWarper,
    logits_process.SuppressTokensLogitsProcessor,
    logits_process.TemperatureLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.TypicalLogitsWarper,
)
_SCORES = Combination((1.0,), (0.0,))  # processed scores stand for themselves
_MOST = 64  # rows of scores that processors are given at once: bounds memory, and what leaves a core's cache
NAN = -2


@dataclass(frozen=True)
class TokenRequest:
    """A token that is wanted: of `text` on `row`, after `offset` of the row's drafts, from row `source` of logits."""

    text: Text
    row: Row
    offset: int
    source: int

    @property
    def position(self) -> int:
        """The number of the token in its text."""
        return self.row.num_new + self.offset

    def seen(self) -> list[int]:
        """Return what processors see: the prompt, and the tokens behind it up to the one that is wanted."""
        return [*self.row.columns, *self.row.new_ids, *self.row.drafts[: self.offset]]


Recorder = Callable[[Sequence[TokenRequest], Tensor, Tensor], None]
"""Is given what was asked for, its raw logits and its scores (n, V)."""


class Processors:
    """The processors that `generate` made for a batch, for rows of it in any order.

    One of them may know how much padding stands before each prompt, by the prompt's place in the batch. A temperature
    alone is left to the kernels, unless scores are wanted (`keeps_scores`).
    """

    def __init__(self, processors: Sequence[Any] = (), *, keeps_scores: bool = False) -> None:
        self.temperature: float | None = None
        if not keeps_scores and len(processors) == 1 and type(processors[0]) is logits_process.TemperatureLogitsWarper:
            self.temperature, processors = processors[0].temperature, ()
        self._processors = LogitsProcessorList(copy(processor) for processor in processors)
        self._padding = [
            (processor, processor.prompt_ignore_length)
            for processor in self._processors
            if isinstance(getattr(processor, "prompt_ignore_length", None), Tensor)
        ]
        self._are_blind = all(type(processor) in _BLIND for processor in self._processors)

    def __bool__(self) -> bool:
        return bool(self._processors)

    def __call__(self, requests: Sequence[TokenRequest], scores: Tensor) -> Tensor:
        """Return the scores (n, V) of the tokens that are asked for, n of them, after processing."""
        seen = [[0] if self._are_blind else one.seen() for one in requests]
        lengths = {len(ids) for ids in seen}
        if len(lengths) == 1:
            return self._process(requests, torch.tensor(seen, device=scores.device), scores)
        processed = torch.empty_like(scores)
        for length in lengths:
            which = [index for index, ids in enumerate(seen) if len(ids) == length]
            ids = torch.tensor([seen[index] for index in which], device=scores.device)
            processed[which] = self._process([requests[index] for index in which], ids, scores[which])
        return processed

    def _process(self, requests: Sequence[TokenRequest], ids: Tensor, scores: Tensor) -> Tensor:
        for processor, lengths in self._padding:
            processor.prompt_ignore_length = lengths[[one.row.batch_row for one in requests]]
        processed: Tensor = self._processors(ids, scores)
        return processed


class NoiseProcessor(LogitsProcessor):  # type: ignore[misc,unused-ignore]
    """Adds the noise of each row to its scores, behind all other processors: greedy decoding then samples.

    So `transformers`' own loop draws the tokens that the decode loop draws. Rows of a prompt stand side by side.
    """

    def __init__(self, seed: int, num_prompt: int, prompts: Sequence[int], samples: Sequence[int]) -> None:
        self._seed = seed
        self._num_prompt = num_prompt
        self._prompts = list(prompts)
        self._samples = list(samples)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores (rows, V) + Gumbel noise for texts (rows, positions)."""
        positions = [input_ids.shape[1] - self._num_prompt] * len(self._prompts)
        noise = make_noise(self._seed, self._prompts, self._samples, positions)
        noisy: Tensor = scores + gumbel(noise, scores.shape[1]).to(scores.device)
        return noisy


class Chooser:
    """Greedy decoding, or sampling where there is a `seed`. `grid` weights the logits of the members."""

    def __init__(
        self,
        grid: Grid,
        processors: Processors,
        seed: int | None,
        *,
        width: int | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        """`width`: that of the scores which processors expect, where the grid's are wider or narrower (a draft's)."""
        self._grid = grid
        self._processors = processors
        self._seed = seed
        self._temperature = None if seed is None else processors.temperature
        self._width = width
        self._recorder = recorder
        self._scores = Weights.of((_SCORES, 0.0), device=grid.weights.table.device)

    def choose(self, logits: Mapping[str, Tensor], requests: Sequence[TokenRequest]) -> list[int]:
        """Return the token of each that is asked for; NAN where a member computed NaN.

        `logits` (rows, n, V_member) by role; without processors, one launch chooses all tokens. The host waits once.
        """
        device = self._grid.weights.table.device
        ordered = [send(values, device) for values in self._grid.ordered(logits)]
        if self._processors or self._recorder is not None:
            tokens = self._choose_processed(ordered, requests)
        else:
            weights = self._weights([one.text.point for one in requests])
            tokens = self._choose_among(ordered, weights, [one.source for one in requests], requests)
        found: list[int] = tokens.tolist()
        return found

    def _weights(self, points: Sequence[int]) -> Weights:
        if len(self._grid) == 1:
            return self._grid.weights
        table = self._grid.weights.table
        return self._grid.weights.replace_table(table[send(torch.tensor(points), table.device)])

    def _choose_among(
        self, logits: list[Tensor], weights: Weights, sources: Sequence[int], requests: Sequence[TokenRequest]
    ) -> Tensor:
        """The tokens of outputs that read rows `sources`, each with the noise of its text and position."""
        device = logits[0].device
        noise = None
        if self._seed is not None:
            numbers = torch.tensor([(one.text.prompt, one.text.sample, one.position) for one in requests])
            noise = send(make_noise(self._seed, *numbers.unbind(1)), device)
        rows = None
        if list(sources) != list(range(logits[0].shape[:-1].numel())):
            rows = send(torch.tensor(sources, dtype=torch.int32), device)
        found = combine_sample(logits, weights, rows, noise=noise, temperature=self._temperature)
        # Where processors forbid everything transformers takes the first token, too.
        return found.tokens.flatten().clamp(min=0).masked_fill(found.logprobs.flatten().isnan(), NAN)

    def _choose_processed(self, logits: list[Tensor], requests: Sequence[TokenRequest]) -> Tensor:
        """The same by way of scores, which are made and processed once for texts of one point and row."""
        groups: dict[tuple[int, int], list[int]] = {}
        for index, one in enumerate(requests):
            groups.setdefault((one.text.point, one.source), []).append(index)
        chosen = torch.empty(len(requests), dtype=torch.int64, device=logits[0].device)
        for start in range(0, len(groups), _MOST):
            batch = list(groups)[start : start + _MOST]
            first = [requests[groups[key][0]] for key in batch]
            rows = send(torch.tensor([source for _, source in batch], dtype=torch.int32), logits[0].device)
            z = combine(logits, self._weights([point for point, _ in batch]), rows)
            is_nan = z.isnan().any(-1)
            if self._width is not None:
                z = torch.nn.functional.pad(z, (0, self._width - z.shape[-1]), value=-torch.inf)
            scores = self._processors(first, z.clone() if self._recorder is not None else z).float()
            if self._recorder is not None:
                self._recorder(first, z, scores)
            indices = [index for key in batch for index in groups[key]]
            sources = [row for row, key in enumerate(batch) for _ in groups[key]]
            tokens = self._choose_among([scores], self._scores, sources, [requests[index] for index in indices])
            chosen[indices] = tokens.clamp(min=0).masked_fill(is_nan[sources], NAN)
        return chosen
