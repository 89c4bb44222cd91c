"""Show where α moved the choice: next-token tables of every member, and a text marked token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ensembler.engine.forward import Step
from ensembler.modeling import EnsembleForCausalLM

ENSEMBLE = "ensemble"


@dataclass(frozen=True)
class Candidate:
    """A next token and its probability."""

    token: int
    probability: float


@dataclass(frozen=True)
class Choice:
    """One token of a text, and what the ensemble and its anchor alone find most probable there.

    `token` is what was chosen: the ensemble's most probable token when decoding is greedy, a drawn one when it samples.
    `probability` is the ensemble's for it, `anchor_probability` the anchor's.
    """

    token: int
    probability: float
    ensemble_token: int
    anchor_token: int
    anchor_probability: float

    @property
    def moved(self) -> bool:
        """Return whether the ensemble's most probable token is not its anchor's."""
        return self.ensemble_token != self.anchor_token


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return what each token adds to the text: a token alone often decodes without the space in front of it."""
    texts, before = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end])
        texts.append(text[len(before) :] if text.startswith(before) else tokenizer.decode([ids[end - 1]]))
        before = text
    return texts


@torch.inference_mode()
def next_tokens(model: EnsembleForCausalLM, ids: Sequence[int], top_k: int = 5) -> dict[str, list[Candidate]]:
    """Return the `top_k` most probable next tokens of the ensemble and of every member, by role, after `ids`."""
    logits = model.member_set.logits(Step(torch.tensor([list(ids)], device=model.device), logits_to_keep=1))
    scores = {ENSEMBLE: model.combine(logits), **logits}
    top_k = min(top_k, *(values.shape[-1] for values in scores.values()))
    return {role: _top(values[0, -1], top_k) for role, values in scores.items()}


def _top(logits: Tensor, top_k: int) -> list[Candidate]:
    values, tokens = logits.float().softmax(-1).topk(top_k)
    return [Candidate(token, value) for token, value in zip(tokens.tolist(), values.tolist(), strict=True)]


@torch.inference_mode()
def explain(model: EnsembleForCausalLM, prompt_ids: Sequence[int], new_ids: Sequence[int]) -> list[Choice]:
    """Return one Choice for each token of `new_ids`, from one forward over the finished text.

    Probabilities are before sampling options: temperature and cut-offs change what is drawn, not what is shown here.
    """
    ids = torch.tensor([[*prompt_ids, *new_ids]], device=model.device)
    logits = model.member_set.logits(Step(ids[:, :-1], logits_to_keep=len(new_ids)))
    ensemble = model.combine(logits)[0].softmax(-1)
    anchor = logits[model.rule.anchor][0].float().softmax(-1).to(ensemble.device)
    tokens = ids[0, len(prompt_ids) :].to(ensemble.device)
    columns = (
        tokens.tolist(),
        ensemble.gather(-1, tokens[:, None])[:, 0].tolist(),
        ensemble.argmax(-1).tolist(),
        anchor.argmax(-1).tolist(),
        anchor.gather(-1, tokens[:, None])[:, 0].tolist(),
    )
    return [Choice(*values) for values in zip(*columns, strict=True)]
