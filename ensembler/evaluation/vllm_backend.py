"""An evaluation's backend that is vLLM's engine. Every point of a grid is a pass of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from ensembler.decoding.options import DecodingOptions
from ensembler.decoding.prompts import EncodedPrompt
from ensembler.decoding.samples import Sample
from ensembler.decoding.texts import GridCompletion
from ensembler.engine.grid import GridPoint
from ensembler.evaluation.batches import Batch
from ensembler.evaluation.requests import ScoringRequest
from ensembler.evaluation.scoring import Score, ScoredRequest
from ensembler.preflight import CheckedEnsemble
from ensembler.serving.choice import BackendChoice
from ensembler.serving.engine import Engine
from ensembler.serving.texts import complete_in_engine

_MOST_TOKENS = 2048
"""Tokens in a step: of a prompt that is scored, vLLM computes the logits of all of them at once."""

TokenScore = tuple[float, bool]
"""A token's log-prob (nats), and whether it is the most probable one."""


class VllmBackend:
    """Requests are those of the other backend, token for token; each continuation is one request to the engine."""

    def __init__(self, checked: CheckedEnsemble, choice: BackendChoice) -> None:
        self._tokenizer = checked.require_tokenizer()
        self._engine = Engine(checked, {"max_num_batched_tokens": _MOST_TOKENS, **choice.arguments})

    def __enter__(self) -> Self:
        self._engine.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._engine.__exit__(kind, error, trace)

    def score(self, batches: Sequence[Batch], grid: Sequence[GridPoint]) -> Iterator[list[ScoredRequest]]:
        """Yield the scores of one batch after another; all of them are in the engine at once."""
        requests = [request for batch in batches for request in batch.requests]
        by_point = []
        for point in grid:
            self._engine.set_point(point)
            by_point.append(self._score(requests))
        scored = iter(
            ScoredRequest(request, tuple(map(_score, zip(*of_request, strict=True))))
            for request, *of_request in zip(requests, *by_point, strict=True)
        )
        for batch in batches:
            yield [next(scored) for _ in batch.requests]

    def complete(
        self, prompts: Sequence[EncodedPrompt], grid: Sequence[GridPoint], options: DecodingOptions
    ) -> Iterator[GridCompletion]:
        """Yield the texts of the prompts."""
        samples: dict[int, dict[GridPoint, list[Sample]]] = {prompt.number: {} for prompt in prompts}
        for point in grid:
            self._engine.set_point(point)
            for one in complete_in_engine(self._engine, self._tokenizer, prompts, options):
                samples[one.number][point] = one.samples
        for prompt in prompts:
            yield GridCompletion(prompt.number, prompt.ids, samples[prompt.number])

    def _score(self, requests: Sequence[ScoringRequest]) -> list[list[list[TokenScore]]]:
        """For each request and continuation the scores of its tokens, at the point that is set."""
        from vllm import SamplingParams

        pieces = [
            (index, number, context, continuation)
            for index, request in enumerate(requests)
            for context, continuations in request.windows()
            for number, continuation in enumerate(continuations)
        ]
        found: list[list[list[TokenScore]]] = [[[] for _ in request.continuations] for request in requests]
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False)
        prompts = [[*context, *continuation] for _, _, context, continuation in pieces]
        scored: dict[int, list[TokenScore]] = {}
        for position, output in self._engine.run(prompts, [params] * len(prompts)):
            _, _, context, continuation = pieces[position]
            behind = output.prompt_logprobs[len(context) :]
            scored[position] = [_token_score(*pair) for pair in zip(continuation, behind, strict=True)]
        for position, (index, number, _, _) in enumerate(pieces):  # the windows of a text in their order
            found[index][number] += scored[position]
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
