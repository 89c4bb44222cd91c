"""Prompts as batches for `generate`: which run together, padded how, with how much room."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig

from ensembler.decoding.prompts import EncodedPrompt
from ensembler.modeling import EnsembleForCausalLM

_INF = float("inf")


class TextLimits(Protocol):
    """The limits of an ensemble's texts: its end tokens and its context. A model has them, and an engine around it."""

    config: Any
    generation_config: Any

    @property
    def shortest_context(self) -> tuple[str, int] | None:
        """The role of the shortest context, and that limit of a text with its answer in tokens; None without any."""


def make_batches(
    model: EnsembleForCausalLM, prompts: Sequence[EncodedPrompt], batch_size: int, max_new_tokens: int
) -> list[list[EncodedPrompt]]:
    """Return `batches_by_length`, with prompts that leave less room than `max_new_tokens` in the context alone."""
    context = model.shortest_context
    return batches_by_length(prompts, batch_size, longest=_INF if context is None else context[1] - max_new_tokens)


def batches_by_length(
    prompts: Sequence[EncodedPrompt], batch_size: int, *, longest: float = _INF
) -> list[list[EncodedPrompt]]:
    """Return batches of prompts of similar length, the longest first: too little memory then shows at once.

    Prompts of more than `longest` tokens, to which the context leaves less room than was asked for, are batches of
    their own: the room of one must not cut the others short.
    """
    ordered = sorted(prompts, key=lambda prompt: (-len(prompt.ids), prompt.number))
    tight = [[prompt] for prompt in ordered if len(prompt.ids) > longest]
    others = ordered[len(tight) :]
    return tight + [others[start : start + batch_size] for start in range(0, len(others), batch_size)]


def room_for(model: TextLimits, num_tokens: int, max_new_tokens: int) -> int:
    """Return how many tokens fit behind prompts of `num_tokens`: `max_new_tokens`, or what the context leaves."""
    context = model.shortest_context
    return max_new_tokens if context is None else min(max_new_tokens, context[1] - num_tokens)


def pad_left(rows: Sequence[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Return ids and mask, both (rows, longest) int64."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def end_ids(model: TextLimits) -> frozenset[int]:
    """The ids that end a text."""
    ends = model.generation_config.eos_token_id
    return frozenset([] if ends is None else ends if isinstance(ends, list) else [ends])


def pad_id(model: EnsembleForCausalLM, tokenizer: Any) -> int:
    """Any id will do where the mask is 0; the end token is what transformers takes by itself."""
    candidates = (model.generation_config.pad_token_id, tokenizer.pad_token_id, *end_ids(model), 0)
    return int(next(token for token in candidates if token is not None))


@contextmanager
def ends_only(model: EnsembleForCausalLM) -> Iterator[None]:
    """Leave only the special ids of the generation config: what else a model's authors like there is not asked for."""
    own = model.generation_config
    ids = {name: getattr(own, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids)
    try:
        yield
    finally:
        model.generation_config = own
