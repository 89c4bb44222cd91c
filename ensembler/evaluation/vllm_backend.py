"""An evaluation's backend that is vLLM's engine. Every point of a grid is a pass of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ensembler.decoding.options import DecodingOptions
from ensembler.decoding.prompts import EncodedPrompt
from ensembler.decoding.samples import Sample
from ensembler.decoding.texts import GridCompletion
from ensembler.engine.grid import GridPoint
from ensembler.evaluation.backends import Advance, ignore
from ensembler.evaluation.batches import Batch, Done
from ensembler.evaluation.requests import ScoringRequest
from ensembler.evaluation.scoring import Score, ScoredRequest
from ensembler.serving.engine import Engine
from ensembler.serving.texts import complete_in_engine

MOST_TOKENS = 2048
"""Tokens in a step: of a prompt that is scored, vLLM computes the logits of all of them at once."""

TokenScore = tuple[float, bool]
"""A token's log-prob (nats), and whether it is the most probable one."""


@dataclass(frozen=True)
class VllmBackend:
    """Requests are those of the other backend, token for token; each continuation is one request to the engine."""

    engine: Engine
    tokenizer: Any

    def score(
        self, batches: Sequence[Batch], points: Sequence[GridPoint], done: Done = frozenset(), advance: Advance = ignore
    ) -> Iterator[list[ScoredRequest]]:
        """Yield the scores of one batch after another; all of them are in the engine at once."""
        left = [[request for request in batch.requests if request.number not in done] for batch in batches]
        by_point = []
        for point in points:
            self.engine.set_point(point)
            by_point.append(self._score([request for requests in left for request in requests]))
        for requests in filter(None, left):
            tokens = [zip(*(found[request.number] for found in by_point), strict=True) for request in requests]
            advance(len(requests))
            yield [ScoredRequest(one, tuple(map(_score, of))) for one, of in zip(requests, tokens, strict=True)]

    def complete(
        self, prompts: Sequence[EncodedPrompt], points: Sequence[GridPoint], options: DecodingOptions
    ) -> Iterator[GridCompletion]:
        """Yield the texts of the prompts."""
        samples: dict[int, dict[GridPoint, list[Sample]]] = {prompt.number: {} for prompt in prompts}
        for point in points:
            self.engine.set_point(point)
            for one in complete_in_engine(self.engine, self.tokenizer, prompts, options):
                samples[one.number][point] = one.samples
        for prompt in prompts:
            yield GridCompletion(prompt.number, prompt.ids, samples[prompt.number])

    def _score(self, requests: Sequence[ScoringRequest]) -> dict[int, list[list[TokenScore]]]:
        """For each request, by its number, the scores of its continuations' tokens, at the point that is set."""
        from vllm import SamplingParams

        pieces = [
            (request.number, index, context, continuation)
            for request in requests
            for context, continuations in request.windows()
            for index, continuation in enumerate(continuations)
        ]
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False)
        prompts = [[*context, *continuation] for _, _, context, continuation in pieces]
        scored: dict[int, list[TokenScore]] = {}
        for position, output in self.engine.run(prompts, [params] * len(prompts)):
            _, _, context, continuation = pieces[position]
            behind = output.prompt_logprobs[len(context) :]
            scored[position] = [_token_score(*pair) for pair in zip(continuation, behind, strict=True)]
        found: dict[int, list[list[TokenScore]]] = {one.number: [[] for _ in one.continuations] for one in requests}
        for position, (number, index, _, _) in enumerate(pieces):  # the windows of a text in their order
            found[number][index] += scored[position]
        return found


def _token_score(token: int, entries: Mapping[int, Any]) -> TokenScore:
    """Of vLLM's entries by token id: those of the token and of the most probable one."""
    best = max(entries, key=lambda one: float(entries[one].logprob))
    logprob = float(entries[token].logprob)
    return logprob, token == best and logprob > -math.inf


def _score(points: Sequence[Sequence[TokenScore]]) -> Score:
    """Of one continuation, from its tokens at each point."""
    return Score(
        tuple(math.fsum(logprob for logprob, _ in tokens) for tokens in points),
        tuple(all(is_greedy for _, is_greedy in tokens) for tokens in points),
        tuple(tuple(logprob for logprob, _ in tokens) for tokens in points),
    )
