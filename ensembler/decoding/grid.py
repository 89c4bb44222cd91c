"""Decode all points of a grid together: texts that agree so far are one row of the members' forward.

A `GridDecoder` plugs into `generate(custom_generate=...)`: `transformers` prepares processors, stopping criteria and
the cache. It does not know texts, files or tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from ensembler.decoding.choosing import NOT_BY_ROW, Chooser, Noise, Processors
from ensembler.decoding.points import Grid, GridPoint
from ensembler.decoding.rows import Rows
from ensembler.decoding.tracks import Tracks
from ensembler.errors import ConfigError
from ensembler.modeling import EnsembleForCausalLM


@dataclass(frozen=True)
class GridOutput:
    """What `generate` returns for a grid.

    `sequences` (points, prompts · samples, positions) int64: prompts and texts as `generate` returns them for each
    point, padded behind their ends; `lengths` (points, prompts · samples) int64 count their positions up to there.
    `rows_per_step`: how many different texts each forward of the members served.
    """

    sequences: Tensor
    lengths: Tensor
    rows_per_step: tuple[int, ...]

    def new_ids(self, prompt_length: int) -> list[list[list[int]]]:
        """Return the tokens behind the prompts, of each point for each prompt and sample."""
        return [
            [ids[prompt_length:end] for ids, end in zip(sequences, ends, strict=True)]
            for sequences, ends in zip(self.sequences.tolist(), self.lengths.tolist(), strict=True)
        ]


class GridDecoder:
    """A decoding method for `generate(custom_generate=...)`: every point's text, as a run of it alone gives it.

    `seed`: of sampling. `numbers`: the prompts' numbers, on which their noise depends (default: their places in the
    batch). With `num_return_sequences` each prompt has several samples; its prefill is run once all the same.
    """

    def __init__(self, points: Sequence[GridPoint], *, seed: int = 0, numbers: Sequence[int] | None = None) -> None:
        self.points = tuple(points)
        self.seed = seed
        self.numbers = numbers

    def __call__(
        self,
        model: EnsembleForCausalLM,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,  # by name they would reach us twice
    ) -> GridOutput:
        """Decode; called by `generate`. Raises ConfigError or InputError for beams and for caches that cannot split."""
        _check(generation_config, logits_processor)
        grid = Grid.of(self.points, model.rule, model.contract, model.config.outside).on(model.device)
        num_samples = generation_config.num_return_sequences or 1
        first = slice(None, None, num_samples)  # transformers repeats each prompt for its samples
        rows = Rows(input_ids[first], model_kwargs, first)
        num_prompts = rows.ids.shape[0]
        tracks = Tracks(len(self.points), num_prompts, num_samples)
        noise = self._noise(num_prompts, num_samples) if generation_config.do_sample else None
        chooser = Chooser(grid, Processors(logits_processor, first), noise)
        complete: list[tuple[Tensor, Tensor]] = []
        rows_per_step = []
        while tracks.num_rows:
            rows_per_step.append(tracks.num_rows)
            tokens = chooser.choose(rows.run(model), rows.ids, tracks)
            parents, new = tracks.advance(tokens)
            texts = rows.extended(parents, new)
            is_complete = stopping_criteria(texts, None).cpu()
            complete += [(ended, texts[row]) for ended, row in tracks.end(is_complete)]
            goes_on = (~is_complete).nonzero().flatten()
            rows.replace(texts[goes_on.to(texts.device)], parents[goes_on])
        return _output(complete, rows_per_step, tracks.row_of.shape, generation_config)

    def _noise(self, num_prompts: int, num_samples: int) -> Noise:
        numbers = range(num_prompts) if self.numbers is None else self.numbers
        if len(numbers) != num_prompts:
            raise ConfigError(f"{len(numbers)} numbers were given for {num_prompts} prompts; give one for each")
        prompts = torch.tensor(list(numbers)).repeat_interleave(num_samples)
        return Noise(self.seed, prompts, torch.arange(num_samples).repeat(num_prompts))


def _check(config: GenerationConfig, processors: LogitsProcessorList) -> None:
    if (config.num_beams or 1) > 1:
        raise ConfigError(f"num_beams is {config.num_beams}; a grid is decoded greedily or by sampling: leave it at 1")
    if config.return_dict_in_generate:
        raise ConfigError("return_dict_in_generate is set; a grid returns a GridOutput: leave it out")
    wrong = next((one for one in processors if isinstance(one, NOT_BY_ROW)), None)
    if wrong is not None:
        raise ConfigError(
            f"{type(wrong).__name__} tells prompts by their place in the batch, which rows of a grid do not keep; "
            "decode one point at a time with it"
        )


def _output(
    complete: Sequence[tuple[Tensor, Tensor]],
    rows_per_step: Sequence[int],
    shape: torch.Size,
    config: GenerationConfig,
) -> GridOutput:
    """Put the texts, each with its tracks (n, 2), in their places."""
    pad = 0 if config._pad_token_tensor is None else int(config._pad_token_tensor)
    longest = max(text.shape[0] for _, text in complete)
    sequences = torch.full((*shape, longest), pad, device=complete[0][1].device)
    lengths = torch.zeros(shape, dtype=torch.int64)
    for tracks, text in complete:
        points, streams = tracks.unbind(-1)
        sequences[points.to(text.device), streams.to(text.device), : text.shape[0]] = text
        lengths[points, streams] = text.shape[0]
    return GridOutput(sequences, lengths, tuple(rows_per_step))
