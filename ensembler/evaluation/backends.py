"""Run an ensemble in an evaluation: by this package's own model, or by vLLM's engine around the same members.

`score` scores rows in memory, as `ensembler score` does those of a file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ensembler.decoding.decoding_options import DecodingOptions
from ensembler.decoding.prompts import EncodedPrompt
from ensembler.decoding.texts import GridCompletion, complete_grid
from ensembler.engine.grid import Grid, GridPoint, make_grid
from ensembler.engine.text_member_set import TextMemberSet
from ensembler.errors import MemberError
from ensembler.evaluation.request_batches import Batch, can_share_contexts, make_batches, run_passes
from ensembler.evaluation.requests import ScoringRequest, make_request
from ensembler.evaluation.scoring import Score, ScoredRequest, score_batch
from ensembler.evaluation.text_scoring import score_texts
from ensembler.modeling import EnsembleForCausalLM
from ensembler.preflight import CheckedEnsemble
from ensembler.serving.choice import VLLM, BackendChoice
from ensembler.serving.vllm_engine import Engine, arguments_of, complete_in_engine

_MOST_TOKENS = 2048  # in a step of vLLM, which computes the logits of all tokens of a prompt that is scored

Advance = Callable[[int], object]
"""A function that gets the number of requests done since it was called last."""

TokenScore = tuple[float, bool]
"""A token's log-prob (nats), and whether it is the most probable one."""


def ignore(num: int) -> None:
    """Show no progress."""


@dataclass(frozen=True)
class TransformersBackend:
    """All points of a grid from one set of member forwards. `tokenizer` is needed for texts alone."""

    model: EnsembleForCausalLM
    tokenizer: Any = None

    def score(
        self, batches: Sequence[Batch], points: Sequence[GridPoint], advance: Advance = ignore
    ) -> Iterator[list[ScoredRequest]]:
        """Yield the scores of one batch after another.

        Raises ConfigError for a rule of other roles than the members', and RunError.
        """
        model = self.model
        grid = Grid.of(points, model.rule, model.contract, model.config.outside).to(model.device)
        if isinstance(model.member_set, TextMemberSet):
            model.member_set.forget()
        for batch in batches:
            if isinstance(model.member_set, TextMemberSet):
                scored = score_texts(batch, model.member_set, grid)
            else:
                scored = score_batch(batch, run_passes(batch.passes, model.member_set), grid)
            advance(len(scored))
            yield scored

    def complete(
        self, prompts: Sequence[EncodedPrompt], points: Sequence[GridPoint], options: DecodingOptions
    ) -> Iterator[GridCompletion]:
        """Yield the texts of the prompts, decoded together; sampled ones depend on seed and prompt's number alone."""
        yield from complete_grid(self.model, self.tokenizer, prompts, points, options, batch_size=len(prompts))


@dataclass(frozen=True)
class VllmBackend:
    """All points of a grid in vLLM's engine at once: a request for each text, or continuation, at each point.

    Requests are those of the other backend, token for token.
    """

    engine: Engine
    tokenizer: Any

    def score(
        self, batches: Sequence[Batch], points: Sequence[GridPoint], advance: Advance = ignore
    ) -> Iterator[list[ScoredRequest]]:
        """Yield the scores of one batch after another; all of them are in the engine at once."""
        requests = [request for batch in batches for request in batch.requests]
        tokens = zip(*self._score(requests, points), strict=True)
        for batch in batches:
            advance(len(batch.requests))
            yield [
                ScoredRequest(one, tuple(_score(islice(tokens, len(ids))) for ids in one.continuations))
                for one in batch.requests
            ]

    def complete(
        self, prompts: Sequence[EncodedPrompt], points: Sequence[GridPoint], options: DecodingOptions
    ) -> Iterator[GridCompletion]:
        """Yield the texts of the prompts, as the other backend does but in any order."""
        yield from complete_in_engine(self.engine, self.tokenizer, prompts, points, options)

    def _score(self, requests: Sequence[ScoringRequest], points: Sequence[GridPoint]) -> list[list[TokenScore]]:
        """Return for each point the scores of all tokens of all continuations, in their order."""
        from vllm import SamplingParams

        pieces = [
            (context, continuation)
            for request in requests
            for context, continuations in request.windows()
            for continuation in continuations
        ]
        texts = [[*context, *continuation] for context, continuation in pieces for _ in points]
        scoring = {"temperature": 0, "max_tokens": 1, "prompt_logprobs": 1, "detokenize": False}
        params = [SamplingParams(**scoring, extra_args=arguments_of(point)) for point in points]
        scored: list[list[TokenScore]] = [[] for _ in texts]
        for number, output in self.engine.run(texts, params * len(pieces)):
            context, continuation = pieces[number // len(points)]
            for token, entries in zip(continuation, output.prompt_logprobs[len(context) :], strict=True):
                best = max(entries, key=lambda one: float(entries[one].logprob))
                self.engine.rules.check_stops([best])
                logprob = float(entries[token].logprob)
                scored[number].append((logprob, token == best and logprob > -math.inf))
        return [[one for of_piece in scored[first :: len(points)] for one in of_piece] for first in range(len(points))]


def _score(tokens: Iterable[Sequence[TokenScore]]) -> Score:
    """Return the score of one continuation, from those of its tokens at all points."""
    points = list(zip(*tokens, strict=True))
    return Score(
        tuple(math.fsum(logprob for logprob, _ in of_point) for of_point in points),
        tuple(all(is_greedy for _, is_greedy in of_point) for of_point in points),
        tuple(tuple(logprob for logprob, _ in of_point) for of_point in points),
    )


Backend = TransformersBackend | VllmBackend
"""Loaded members that score and complete at all points of a grid."""


@contextmanager
def open_backend(choice: BackendChoice, checked: CheckedEnsemble) -> Iterator[Backend]:
    """Load the members for a `with` block, which gets the backend. Raises MemberError or RunError."""
    tokenizer = checked.require_tokenizer()
    if choice.name == VLLM:
        with Engine(checked, {"max_num_batched_tokens": _MOST_TOKENS, **choice.arguments}) as engine:
            yield VllmBackend(engine, tokenizer)
    else:
        yield TransformersBackend(EnsembleForCausalLM.from_checked(checked), tokenizer)


def score(
    model: EnsembleForCausalLM | str | Path,
    rows: Iterable[Mapping[str, Any]],
    *,
    alpha: float | Iterable[float] | None = None,
    batch_size: int = 8,
    per_token: bool = False,
) -> list[dict[str, Any]]:
    """Return for each of `rows` what `ensembler score` writes for a line: log-probs (nats) at every α, perplexities ...

    `model`: an ensemble, or its folder or hub id. A row has a `text`, a `prompt` and a `continuation`, or a `prompt`
    and `choices`. `alpha`: a number or several, which share the forwards; by default the ensemble's. `per_token` adds
    the tokens and their log-probs. Raises PromptError for a row that cannot be scored.
    """
    if not isinstance(model, EnsembleForCausalLM):
        model = EnsembleForCausalLM.from_pretrained(model)
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise MemberError("the ensemble has no tokenizer, which texts need; set model.tokenizer to the anchor's")
    given = model.alpha if alpha is None else alpha
    alphas = [model.rule.check_alpha(each) for each in (given if isinstance(given, Iterable) else [given])]
    requests = [
        make_request(row, number, f"rows[{number}]", tokenizer, context=model.shortest_context)
        for number, row in enumerate(rows)
    ]
    shares = can_share_contexts(member.config for member in model.members.values())
    batches = make_batches(requests, batch_size, share_contexts=shares)
    points = make_grid([model.rule.name], alphas)
    found = TransformersBackend(model).score(batches, points)
    scored = sorted((one for batch in found for one in batch), key=lambda one: one.request.number)
    return [one.to_row(points, tokenizer if per_token else None) for one in scored]
