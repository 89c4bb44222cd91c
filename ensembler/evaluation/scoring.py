"""Log-probs of given continuations under an ensemble, for all α of a grid from one set of member forwards."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ensembler_kernels import Combination, combine_logprob
from torch import Tensor

from ensembler.config import EnsembleConfig
from ensembler.errors import RunError
from ensembler.evaluation.batches import Batch, Pass
from ensembler.evaluation.requests import ScoringRequest
from ensembler.modeling import EnsembleForCausalLM

_BLOCK = 256  # tokens that are combined at once: bounds the copies of logits that choices share

ReadLogits = Callable[[Pass], Mapping[str, Tensor]]
"""Returns, for a pass, the needed logits (num_needed, V_member) of every member by role, on one device."""


@dataclass(frozen=True)
class Score:
    """One continuation: for each α the log-prob (nats, summed over its tokens), and whether greedy decoding gives it.

    A log-prob is −inf where the ensemble forbids one of the tokens.
    """

    log_probs: tuple[float, ...]
    is_greedy: tuple[bool, ...]
    num_tokens: int

    def to_row(self) -> dict[str, Any]:
        """The same for a JSON line, where null is a log-prob of −inf: JSON knows no infinity."""
        numbers = [log_prob if log_prob > -math.inf else None for log_prob in self.log_probs]
        return {
            "log_prob": [None if number is None else round(number, 6) for number in numbers],
            "log_prob_per_token": [
                None if number is None else round(number / self.num_tokens, 6) for number in numbers
            ],
            "greedy": list(self.is_greedy),
            "num_tokens": self.num_tokens,
        }


@dataclass(frozen=True)
class ScoredRequest:
    """A request and the scores of its continuations, in their order."""

    request: ScoringRequest
    scores: tuple[Score, ...]

    def to_row(self, alphas: Sequence[float]) -> dict[str, Any]:
        """One line of the output file: lists over `alphas`, for the continuation or for each of the choices."""
        bodies = [score.to_row() for score in self.scores]
        body = {"choices": bodies} if self.request.has_choices else bodies[0]
        return {"number": self.request.number, "alpha": list(alphas), **body}


def fingerprint(
    config: EnsembleConfig, requests: Sequence[ScoringRequest], alphas: Sequence[float], *, batch_size: int
) -> str:
    """Return a short hash of all that the scores of a run depend on, but for the weights themselves."""
    settings = {
        "requests": [[request.number, request.context, request.continuations] for request in requests],
        "ensemble": {key: value for key, value in config.to_dict().items() if key != "transformers_version"},
        "alphas": list(alphas),
        "batch_size": batch_size,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def score_together(
    model: EnsembleForCausalLM,
    batches: Sequence[Batch],
    alphas: Sequence[float],
    *,
    done: frozenset[int] = frozenset(),
) -> Iterator[list[ScoredRequest]]:
    """Yield the scores of one batch after another, all members being loaded.

    Requests whose numbers are in `done` are left out, and batches of them alone are not run. Raises RunError.
    """

    def read(one: Pass) -> dict[str, Tensor]:
        logits = model.member_logits(one.step)
        return {role: one.take(values).to(model.device) for role, values in logits.items()}

    for batch in unfinished(batches, done):
        yield score_batch(batch, read, model.rule.roles, model.combination, alphas, done=done)


def unfinished(batches: Sequence[Batch], done: frozenset[int]) -> list[Batch]:
    """Return the batches with a request whose number is not in `done`."""
    return [batch for batch in batches if any(request.number not in done for request in batch.requests)]


@torch.inference_mode()
def score_batch(
    batch: Batch,
    read: ReadLogits,
    roles: Sequence[str],
    how: Combination,
    alphas: Sequence[float],
    *,
    done: frozenset[int] = frozenset(),
) -> list[ScoredRequest]:
    """Return the scores of a batch: log p(continuation) = Σ_t log softmax(z(α))[token_t], summed in float64.

    `roles`: the members in the order of `how`. Raises RunError where the ensemble leaves no token possible.
    """
    num = sum(len(request.continuations) for request in batch.requests)
    sums, misses = torch.zeros(2, len(alphas), num, dtype=torch.float64)
    for one in batch.passes:
        logits = read(one)
        try:
            logprobs, greedy = _score_tokens(one, [logits[role] for role in roles], how, alphas)
        except ValueError as error:
            sources = ", ".join(request.source for request in batch.requests)
            raise RunError(f"no log-prob could be computed in the batch of {sources}: {error}") from error
        sums.index_add_(1, one.continuations, logprobs)
        misses.index_add_(1, one.continuations, 1 - greedy)
    columns = iter(zip(sums.T.tolist(), (misses == 0).T.tolist(), strict=True))
    scored = []
    for request in batch.requests:
        scores = [
            Score(tuple(log_probs), tuple(is_greedy), len(ids))
            for ids, (log_probs, is_greedy) in zip(request.continuations, columns, strict=False)
        ]
        scored.append(ScoredRequest(request, tuple(scores)))
    return [one for one in scored if one.request.number not in done]


def _score_tokens(
    one: Pass, logits: Sequence[Tensor], how: Combination, alphas: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Return log-probs and greedy flags of the tokens of a pass, both (K, num_tokens) float64 on the CPU."""
    tokens, needed = one.tokens.to(logits[0].device), one.needed.to(logits[0].device)
    blocks = [
        combine_logprob([values[positions] for values in logits], how, alphas, chosen)
        for chosen, positions in zip(torch.split(tokens, _BLOCK), torch.split(needed, _BLOCK), strict=True)
    ]
    logprobs, greedy = (torch.cat(parts, dim=1).cpu().double() for parts in zip(*blocks, strict=True))
    return logprobs, greedy
