"""Score rows in memory, as `ensembler score` does those of a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ensembler.engine.grid import make_grid
from ensembler.errors import MemberError
from ensembler.evaluation.backends import TransformersBackend
from ensembler.evaluation.batches import can_share_contexts, make_batches
from ensembler.evaluation.requests import make_request
from ensembler.modeling import EnsembleForCausalLM


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
    found = TransformersBackend(model).score(batches, make_grid([model.rule.name], alphas))
    scored = sorted((one for batch in found for one in batch), key=lambda one: one.request.number)
    return [one.to_row(alphas, tokenizer if per_token else None) for one in scored]
