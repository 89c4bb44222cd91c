"""Decode what our loop leaves out in `transformers`' own loop: on its own caches, with the noise of ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy, deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from ensembler.decoding.choosing import NOT_BY_ROW, NoiseProcessor
from ensembler.decoding.samples import GridOutput
from ensembler.engine.grid import Grid
from ensembler.engine.row_cache import RowCache
from ensembler.modeling import EnsembleForCausalLM


def decode_by_transformers(
    model: EnsembleForCausalLM,
    grid: Grid | None,
    make_noise: Callable[[], NoiseProcessor],
    prepared: dict[str, Any],
    streamer: BaseStreamer | None = None,
) -> Any:
    """Decode what `generate` has prepared, the points of a `grid` one after another; draws are those of the loop."""
    config: GenerationConfig = prepared["generation_config"]
    if config.do_sample and not (config.output_scores or config.is_assistant):  # scores are given back as they are
        prepared["logits_processor"] = LogitsProcessorList([*prepared["logits_processor"], make_noise()])
        prepared["generation_config"] = copy(config)
        prepared["generation_config"].do_sample = False
    if grid is not None:
        return _point_by_point(model, grid, prepared)
    return model.sample_as_transformers(**prepared, streamer=streamer)


def why_transformers(
    model: EnsembleForCausalLM,
    processors: Sequence[Any],
    criteria: Sequence[Any],
    config: GenerationConfig,
    model_kwargs: dict[str, Any],
    *,
    by_row: bool,
) -> str | None:
    """Return why `transformers`' own loop has to decode, or None where the decode loop can.

    `by_row`: processors and criteria that are not of `transformers` may be asked about some rows of a batch alone.
    """
    cache = model_kwargs.get("past_key_values")
    by_number = next((one for one in processors if isinstance(one, NOT_BY_ROW)), None)
    if by_number is not None:
        return f"{type(by_number).__name__} knows texts by their place in the batch, or keeps a state of its own"
    own = next((one for one in (*processors, *criteria) if not by_row and _is_foreign(one)), None)
    if own is not None:
        return f"{type(own).__name__} may look at the whole batch; give a Decoder as custom_generate if it does not"
    if config.is_assistant:
        return "it drafts for another model"
    if not config.use_cache:
        return "use_cache is off"
    if config.cache_implementation is not None:
        return f"cache_implementation is {config.cache_implementation!r}"
    if cache is not None and not isinstance(cache, RowCache):
        return "past_key_values is a growing cache; one that generate has returned can be gone on with"
    if config.output_attentions or config.output_hidden_states:
        return "attentions and hidden states of members are not combined"
    mask = model_kwargs.get("attention_mask")
    if mask is not None and not mask.any(-1).all():
        return "no token of a row is seen"
    if not _are_plain_positions(model_kwargs.get("position_ids"), mask):
        return "position_ids were given"
    return model.member_set.why_not_by_row()


def _is_foreign(one: object) -> bool:
    """Return whether a processor or criterion is neither of `transformers` nor ours."""
    return type(one).__module__.partition(".")[0] not in ("transformers", "ensembler")


def _are_plain_positions(positions: Tensor | None, mask: Tensor | None) -> bool:
    """Return whether positions count the tokens that are seen, as `generate` makes them."""
    if positions is None:
        return True
    if mask is None:
        return torch.equal(positions, torch.arange(positions.shape[1], device=positions.device).expand_as(positions))
    counted = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)
    return torch.equal(positions, counted)


def _point_by_point(model: EnsembleForCausalLM, grid: Grid, prepared: dict[str, Any]) -> GridOutput:
    config, num_prompt = prepared["generation_config"], prepared["input_ids"].shape[1]
    found = []
    for rule, alphas in grid.runs:
        for alpha in alphas:
            # Decoding changes a cache that was given, and processors that keep a state: each point gets copies.
            own = {**prepared, "past_key_values": deepcopy(prepared.get("past_key_values"))}
            own["logits_processor"] = LogitsProcessorList(
                deepcopy(one, {id(model): model}) if isinstance(one, NOT_BY_ROW) else one
                for one in prepared["logits_processor"]
            )
            with model.at(rule, alpha):
                found.append(model.sample_as_transformers(**own))
    lengths = torch.tensor([[_length(row, num_prompt, config._eos_token_tensor) for row in one] for one in found])
    longest = max(one.shape[1] for one in found)
    pad = 0 if config._pad_token_tensor is None else int(config._pad_token_tensor)
    sequences = torch.stack([torch.nn.functional.pad(one, (0, longest - one.shape[1]), value=pad) for one in found])
    return GridOutput(sequences, lengths, (len(grid),) * (longest - num_prompt))


def _length(row: Tensor, num_prompt: int, ends: Tensor | None) -> int:
    """Return the positions of a text up to its first end token behind the prompt."""
    found = [] if ends is None else torch.isin(row[num_prompt:], ends).nonzero().flatten().tolist()
    return num_prompt + found[0] + 1 if found else row.shape[0]
