"""Texts for all points of a grid: batches of prompts, decoded together, each point's text as a run of it alone."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ensembler.decoding.batches import end_ids, ends_only, make_batches, pad_id, pad_left, room_for
from ensembler.decoding.grid import GridDecoder
from ensembler.decoding.points import Grid, GridPoint
from ensembler.decoding.prompts import EncodedPrompt
from ensembler.decoding.samples import Sample, make_sample, stopping_criteria
from ensembler.decoding.texts import DecodingOptions
from ensembler.errors import ConfigError
from ensembler.modeling import EnsembleForCausalLM


@dataclass(frozen=True)
class GridCompletion:
    """All samples of one prompt at every point of the grid."""

    number: int
    prompt_ids: list[int]
    samples: dict[GridPoint, list[Sample]]


@dataclass(frozen=True)
class GridBatch:
    """The completions of one batch, the seconds that it took, and how many rows each forward of the members had."""

    completions: list[GridCompletion]
    seconds: float
    rows_per_step: tuple[int, ...]

    @property
    def mean_rows(self) -> float:
        """The mean number of different texts per step; a run of all points apart has points · prompts · samples."""
        return sum(self.rows_per_step) / len(self.rows_per_step)


def complete_grid(
    model: EnsembleForCausalLM,
    tokenizer: Any,
    prompts: Sequence[EncodedPrompt],
    points: Sequence[GridPoint],
    options: DecodingOptions,
    *,
    batch_size: int = 1,
    done: frozenset[int] = frozenset(),
) -> Iterator[GridBatch]:
    """Yield one batch of prompts after another, decoded at all `points`; the model's own α does not count.

    A greedy text is that of `complete_batches` at its rule and α. A sampled one depends on (seed, prompt's number,
    sample, position) and its own distribution alone: neither on the other points nor on the batch (but for rounding,
    which depends on the number of rows). Prompts whose numbers are in `done` are not yielded, and batches of them alone
    are not run. Raises ConfigError for points that do not fit the model, and for beams.
    """
    # What is wrong with the points should be said before any prompt is run.
    Grid.of(points, model.rule, model.contract, model.config.outside)
    if options.num_beams > 1:
        raise ConfigError(f"num_beams is {options.num_beams}; a grid is decoded without beams: leave it at 1")
    seed = int(torch.randint(2**63 - 1, ())) if options.seed is None else options.seed
    for batch in make_batches(model, prompts, batch_size, options.max_new_tokens):
        if any(prompt.number not in done for prompt in batch):
            with ends_only(model):
                completed = _complete(model, tokenizer, batch, points, options, seed)
            yield replace(completed, completions=[one for one in completed.completions if one.number not in done])


def _complete(
    model: EnsembleForCausalLM,
    tokenizer: Any,
    batch: Sequence[EncodedPrompt],
    points: Sequence[GridPoint],
    options: DecodingOptions,
    seed: int,
) -> GridBatch:
    start = time.perf_counter()
    input_ids, attention_mask = pad_left([prompt.ids for prompt in batch], pad_id(model, tokenizer))
    length = input_ids.shape[1]
    room = room_for(model, length, options.max_new_tokens)
    output = model.generate(
        input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        generation_config=options.generation_config(room),
        stopping_criteria=stopping_criteria(tokenizer, options.stop, length),
        custom_generate=GridDecoder(points, seed=seed, numbers=[prompt.number for prompt in batch]),
    )
    ends, num = end_ids(model), options.num_return_sequences

    def sample(ids: list[int]) -> Sample:
        made = make_sample(ids, tokenizer, ends, options.stop)
        return replace(made, finish_reason="stop") if len(ids) < room else made

    texts = [[sample(ids) for ids in of_point] for of_point in output.new_ids(length)]
    completions = [
        GridCompletion(
            prompt.number,
            prompt.ids,
            {point: of_point[row * num : (row + 1) * num] for point, of_point in zip(points, texts, strict=True)},
        )
        for row, prompt in enumerate(batch)
    ]
    return GridBatch(completions, time.perf_counter() - start, output.rows_per_step)
