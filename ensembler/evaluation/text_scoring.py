"""Scores of given continuations where members have different tokenizers.

Along a text the mixture is p_anchor(tokens) · (P(text) / P'(text))^α, whatever the tokens of the other members. It is
not normalised over all texts: scores compare continuations of one context, and are no perplexities.
"""

from __future__ import annotations

import torch

from ensembler.engine.grid import Grid
from ensembler.engine.model_runner import check_nan
from ensembler.engine.text_member_set import TextMemberSet
from ensembler.evaluation.request_batches import Batch, run_passes
from ensembler.evaluation.scoring import Score, ScoredRequest


@torch.inference_mode()
def score_texts(batch: Batch, members: TextMemberSet, grid: Grid) -> list[ScoredRequest]:
    """Return the scores of a batch at each point: weight · log p_anchor(token) + Σ weight · log P(bytes), by token.

    Whether a continuation is the greedy one is not known (None): it would need all other tokens. Raises LogitsError for
    NaN, PromptError and RunError for a text that a member cannot read or write.
    """
    texts = [
        (context, continuation)
        for request in batch.requests
        for context, continuations in request.windows()
        for continuation in continuations
    ]
    by_role = members.text.score(texts)
    logprobs = {role: [one for of_text in by_role for one in of_text[role].log_probs] for role in members.text.members}
    logprobs |= _own_log_probs(batch, members, sum(len(ids) for _, ids in texts))
    anchor = members.text.plan.anchor_role
    values = torch.tensor([logprobs[role] for role in grid.roles], dtype=torch.float64)  # (roles, tokens)
    weights = [rule.weights(alpha) for rule, alphas in grid.runs for alpha in alphas]
    table = torch.tensor([[one[role] for role in grid.roles] for one in weights], dtype=torch.float64)
    terms = table[:, :, None] * values
    terms = terms.masked_fill(table[:, :, None] == 0, 0.0)  # 0 · −∞ is NaN
    alone = terms[:, grid.roles.index(anchor)]
    ratio = terms.sum(1) - alone
    # As in decoding, a ratio counts as 0 where it is undefined, or infinite because only the divisor forbids the text.
    scores = alone + ratio.masked_fill(ratio.isnan() | (ratio == torch.inf), 0.0)
    scored, start = [], 0
    for request in batch.requests:
        of_request = []
        for ids in request.continuations:
            tokens = scores[:, start : start + len(ids)]
            start += len(ids)
            sums = tuple(tokens.sum(1).tolist())
            of_request.append(Score(sums, (None,) * len(grid), tuple(map(tuple, tokens.tolist()))))
        scored.append(ScoredRequest(request, tuple(of_request)))
    return scored


def _own_log_probs(batch: Batch, members: TextMemberSet, num: int) -> dict[str, list[float]]:
    """Return by role the log-probs of all tokens of all continuations under the members of the anchor's tokenizer."""
    found = {role: torch.zeros(num, dtype=torch.float64) for role in members.contract.widths}
    for one, logits in run_passes(batch.passes, members.by_ids):
        check_nan(logits)
        for role, values in logits.items():
            is_anchor = role == members.text.plan.anchor_role
            rows = values.float().log_softmax(-1) if is_anchor else members.text.own_log_probs(values)
            found[role][one.slots] = rows[one.needed, one.tokens].double().cpu()
    return {role: values.tolist() for role, values in found.items()}
