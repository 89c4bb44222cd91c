"""Log-probs of given continuations under an ensemble, for all points of a grid from one set of member forwards."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from ensembler_kernels import check_scored, combine_logprob
from torch import Tensor

from ensembler.config import EnsembleConfig
from ensembler.engine.grid import Grid, GridPoint
from ensembler.engine.model_runner import check_nan
from ensembler.errors import RunError
from ensembler.evaluation.request_batches import Batch, Logits, Pass
from ensembler.evaluation.requests import ScoringRequest
from ensembler.files import digest


@dataclass(frozen=True)
class Score:
    """The score of one continuation: for each point its log-prob in nats, and whether it is the greedy one.

    A log-prob, the sum of its `token_log_probs`, is −inf where the ensemble forbids one of the tokens. `is_greedy` is
    None where tokenizers differ: what else might have followed is not compared then, and log-probs are those of the
    text but for a constant.
    """

    log_probs: tuple[float, ...]
    is_greedy: tuple[bool | None, ...]
    token_log_probs: tuple[tuple[float, ...], ...]

    @property
    def num_tokens(self) -> int:
        """The number of tokens of the continuation."""
        return len(self.token_log_probs[0])

    @property
    def perplexities(self) -> tuple[float, ...]:
        """The perplexity at each point: exp(−log-prob / tokens); NaN where log-probs are not normalised."""
        if None in self.is_greedy:
            return (math.nan,) * len(self.log_probs)
        nats = (-log_prob / self.num_tokens for log_prob in self.log_probs)
        return tuple(math.exp(one) if one < 700 else math.inf for one in nats)


def _rounded(numbers: Sequence[float]) -> list[float | None]:
    return [round(number, 6) if math.isfinite(number) else None for number in numbers]


@dataclass(frozen=True)
class ScoredRequest:
    """A request and the scores of its continuations, in their order."""

    request: ScoringRequest
    scores: tuple[Score, ...]

    def to_row(self, points: Sequence[GridPoint], tokenizer: Any | None = None) -> dict[str, Any]:
        """Return one line of the output file: lists over `points`, for the continuation or for each of the choices.

        A number that is not finite is null, since JSON has no infinity. `merged` is there and true where a token spans
        the end of the prompt. With a `tokenizer`, the single tokens and their log-probs are added.
        """
        bodies = []
        for score, ids in zip(self.scores, self.request.continuations, strict=True):
            body: dict[str, Any] = {
                "log_prob": _rounded(score.log_probs),
                "log_prob_per_token": _rounded([log_prob / score.num_tokens for log_prob in score.log_probs]),
                "perplexity": _rounded(score.perplexities),
                "greedy": list(score.is_greedy),
                "num_tokens": score.num_tokens,
            }
            if tokenizer is not None:
                body["tokens"] = tokenizer.convert_ids_to_tokens(list(ids))
                body["token_log_probs"] = [_rounded(each) for each in score.token_log_probs]
            bodies.append(body)
        whole = {"choices": bodies} if self.request.has_choices else bodies[0]
        rules, alphas = [point.rule for point in points], [point.alpha for point in points]
        merged = {"merged": True} if self.request.is_merged else {}
        return {"number": self.request.number, "rule": rules, "alpha": alphas, **merged, **whole}


def run_settings(
    config: EnsembleConfig,
    requests: Sequence[ScoringRequest],
    points: Sequence[GridPoint],
    options: Mapping[str, object],
) -> dict[str, Any]:
    """Return all that the results of a run with `options` depend on, but for the weights themselves."""
    return {
        "rows": digest([[one.number, one.context, one.continuations, one.window, one.fields] for one in requests]),
        "ensemble": {key: value for key, value in config.to_dict().items() if key != "transformers_version"},
        "points": [f"{point.rule} at {point.alpha:g}" for point in points],
        **options,
    }


@torch.inference_mode()
def score_batch(batch: Batch, results: Iterable[tuple[Pass, Logits]], grid: Grid) -> list[ScoredRequest]:
    """Return the scores of a batch: log p(continuation) = Σ_t log softmax(z)[token_t] at each point, summed in float64.

    `results`: its passes with their logits, on any devices. Raises RunError where the ensemble leaves no token
    possible.
    """
    lengths = [len(ids) for request in batch.requests for ids in request.continuations]
    logprobs = torch.zeros(len(grid), sum(lengths), dtype=torch.float64)
    greedy = torch.zeros(len(grid), sum(lengths), dtype=torch.bool)
    for one, logits in results:
        try:
            logprobs[:, one.slots], greedy[:, one.slots] = _score_tokens(one, logits, grid)
        except ValueError as error:
            raise no_log_prob(batch, logits, error) from error
    scores = (
        Score(tuple(of_tokens.sum(1).tolist()), tuple(flags.all(1).tolist()), tuple(map(tuple, of_tokens.tolist())))
        for of_tokens, flags in zip(torch.split(logprobs, lengths, 1), torch.split(greedy, lengths, 1), strict=True)
    )
    return [ScoredRequest(one, tuple(islice(scores, len(one.continuations)))) for one in batch.requests]


def _score_tokens(one: Pass, logits: Logits, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return the log-probs and greedy flags of the tokens of a pass, (points, tokens) on the CPU."""
    device = grid.weights.table.device
    ordered = [values.to(device) for values in grid.ordered(logits)]
    tokens = one.tokens.to(device)
    inside = tokens < grid.weights.width([z.shape[-1] for z in ordered])  # a token beyond that is impossible
    scored = combine_logprob(ordered, grid.weights, tokens.where(inside, 0), one.needed.to(device))
    check_scored(scored, grid.weights.alphas)
    return scored.logprobs.where(inside, -math.inf).double().cpu(), (scored.greedy & inside).cpu()


def no_log_prob(batch: Batch, logits: Logits, error: object) -> RunError:
    """Return the error of a batch that has no log-probs. Raises LogitsError where a member computed NaN."""
    check_nan(logits)
    sources = ", ".join(dict.fromkeys(request.source for request in batch.requests))
    return RunError(f"no log-prob could be computed in the batch of {sources}: {error}")
