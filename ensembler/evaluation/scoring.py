"""Log-probs of given continuations under an ensemble, for all points of a grid from one set of member forwards."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ensembler_kernels import check_scored, combine_logprob
from torch import Tensor

from ensembler.config import EnsembleConfig
from ensembler.engine.forward import check_nan
from ensembler.engine.grid import Grid, GridPoint
from ensembler.errors import RunError
from ensembler.evaluation.batches import Batch
from ensembler.evaluation.passes import Pass, run_pass
from ensembler.evaluation.requests import ScoringRequest
from ensembler.modeling import EnsembleForCausalLM

Logits = Mapping[str, Tensor]
"""For a pass, the needed logits (num_needed, V_member) of every member by role, on one device."""


@dataclass(frozen=True)
class Score:
    """One continuation: for each point the log-prob (nats, summed over its tokens), and whether it is the greedy one.

    A log-prob is −inf where the ensemble forbids one of the tokens. `token_log_probs`: for each point those of the
    tokens.
    """

    log_probs: tuple[float, ...]
    is_greedy: tuple[bool, ...]
    token_log_probs: tuple[tuple[float, ...], ...]

    @property
    def num_tokens(self) -> int:
        """The tokens of the continuation."""
        return len(self.token_log_probs[0])

    @property
    def perplexities(self) -> tuple[float, ...]:
        """For each point exp(−log-prob / tokens)."""
        return tuple(_exp(-log_prob / self.num_tokens) for log_prob in self.log_probs)

    def to_row(self, tokens: Sequence[str] | None = None) -> dict[str, Any]:
        """The same for a JSON line, where null is a number that is not finite: JSON knows no infinity.

        With `tokens` as the tokenizer writes them, these and their log-probs too.
        """
        row = {
            "log_prob": _rounded(self.log_probs),
            "log_prob_per_token": _rounded([log_prob / self.num_tokens for log_prob in self.log_probs]),
            "perplexity": _rounded(self.perplexities),
            "greedy": list(self.is_greedy),
            "num_tokens": self.num_tokens,
        }
        if tokens is None:
            return row
        return {**row, "tokens": list(tokens), "token_log_probs": [_rounded(each) for each in self.token_log_probs]}


def _exp(number: float) -> float:
    return math.exp(number) if number < 700 else math.inf


def _rounded(numbers: Sequence[float]) -> list[float | None]:
    return [round(number, 6) if math.isfinite(number) else None for number in numbers]


@dataclass(frozen=True)
class ScoredRequest:
    """A request and the scores of its continuations, in their order."""

    request: ScoringRequest
    scores: tuple[Score, ...]

    def to_row(self, alphas: Sequence[float], tokenizer: Any | None = None) -> dict[str, Any]:
        """One line of the output file: lists over `alphas`, for the continuation or for each of the choices.

        With a `tokenizer`, the single tokens and their log-probs too.
        """
        bodies = [
            score.to_row(None if tokenizer is None else tokenizer.convert_ids_to_tokens(list(ids)))
            for score, ids in zip(self.scores, self.request.continuations, strict=True)
        ]
        body = {"choices": bodies} if self.request.has_choices else bodies[0]
        return {"number": self.request.number, "alpha": list(alphas), **body}


def fingerprint(
    config: EnsembleConfig,
    requests: Sequence[ScoringRequest],
    grid: Sequence[GridPoint],
    *,
    batch_size: int,
    per_token: bool = False,
) -> str:
    """Return a short hash of all that the rows of a run depend on, but for the weights themselves."""
    settings = {
        "requests": [[one.number, one.context, one.continuations, one.window] for one in requests],
        "ensemble": {key: value for key, value in config.to_dict().items() if key != "transformers_version"},
        "grid": [[point.rule, point.alpha] for point in grid],
        "batch_size": batch_size,
        "per_token": per_token,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def score_together(
    model: EnsembleForCausalLM,
    batches: Sequence[Batch],
    grid: Sequence[GridPoint],
    *,
    done: frozenset[int] = frozenset(),
) -> Iterator[list[ScoredRequest]]:
    """Yield the scores of one batch after another, all members being loaded; all points share their forwards.

    Requests whose numbers are in `done` are left out, and batches of them alone are not run. Raises ConfigError for a
    rule of other roles than the members', and RunError.
    """
    points = Grid.of(grid, model.rule, model.contract, model.config.outside).on(model.device)
    for batch in unfinished(batches, done):
        yield score_batch(batch, _run_batch(model, batch), points, done=done)


def _run_batch(model: EnsembleForCausalLM, batch: Batch) -> Iterator[tuple[Pass, Logits]]:
    for whole in batch.passes:
        for one, logits in run_pass(whole, model.member_set.logits, model.new_cache):
            yield one, {role: values.to(model.device) for role, values in logits.items()}


def unfinished(batches: Sequence[Batch], done: frozenset[int]) -> list[Batch]:
    """Return the batches with a request whose number is not in `done`."""
    return [batch for batch in batches if any(request.number not in done for request in batch.requests)]


@torch.inference_mode()
def score_batch(
    batch: Batch,
    results: Iterable[tuple[Pass, Logits]],
    points: Grid,
    *,
    done: frozenset[int] = frozenset(),
) -> list[ScoredRequest]:
    """Return the scores of a batch: log p(continuation) = Σ_t log softmax(z)[token_t] at each point, summed in float64.

    `results`: its passes with their logits. Raises RunError where the ensemble leaves no token possible.
    """
    lengths = [len(ids) for request in batch.requests for ids in request.continuations]
    logprobs = torch.zeros(len(points), sum(lengths), dtype=torch.float64)
    greedy = torch.zeros(len(points), sum(lengths), dtype=torch.bool)
    for one, logits in results:
        try:
            _score_tokens(one, logits, points, logprobs, greedy)
        except ValueError as error:
            check_nan(logits)
            sources = ", ".join(request.source for request in batch.requests)
            raise RunError(f"no log-prob could be computed in the batch of {sources}: {error}") from error
    parts = zip(*(torch.split(table, lengths, dim=1) for table in (logprobs, greedy)), strict=True)
    scores = iter([_score(*part) for part in parts])
    scored = [ScoredRequest(one, tuple(next(scores) for _ in one.continuations)) for one in batch.requests]
    return [one for one in scored if one.request.number not in done]


def _score(logprobs: Tensor, greedy: Tensor) -> Score:
    """Of one continuation, both (num_points, tokens)."""
    return Score(
        tuple(logprobs.sum(dim=1).tolist()), tuple(greedy.all(dim=1).tolist()), tuple(map(tuple, logprobs.tolist()))
    )


def _score_tokens(one: Pass, logits: Logits, points: Grid, logprobs: Tensor, greedy: Tensor) -> None:
    """Write the log-probs and greedy flags of the tokens of a pass to their slots, (points, slots) on the CPU."""
    ordered = points.ordered(logits)
    device = ordered[0].device
    tokens = one.tokens.to(device)
    inside = tokens < points.weights.width([z.shape[-1] for z in ordered])  # a token beyond that is impossible
    scored = combine_logprob(ordered, points.weights, tokens.where(inside, 0), one.needed.to(device))
    check_scored(scored, points.weights.alphas)
    logprobs[:, one.slots] = scored.logprobs.where(inside, -math.inf).double().cpu()
    greedy[:, one.slots] = (scored.greedy & inside).cpu()
