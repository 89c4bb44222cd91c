"""Decoding for `generate`: the decode loop, wherever it does what was asked, else `transformers`' own.

`EnsembleForCausalLM.generate` decodes with a `Decoder` by itself; one of your own, with a draft or with the points of a
grid, is given as `generate(custom_generate=Decoder(...))`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, GenerateDecoderOnlyOutput, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

from ensembler.decoding.by_transformers import decode_by_transformers, why_transformers
from ensembler.decoding.choosing import Asked, Chooser, NoiseProcessor, Processors, Recorder
from ensembler.decoding.decode_stats import DecodingStats, Meter
from ensembler.decoding.drafting import AUTO, Pace, find_drafter
from ensembler.decoding.loop import DecodeLoop, Read
from ensembler.decoding.rows import Row, Text
from ensembler.decoding.samples import Ends, GridOutput, Stream
from ensembler.engine.forward import Forward, Step
from ensembler.engine.grid import Grid, GridPoint, make_combination
from ensembler.engine.row_cache import RowCache
from ensembler.errors import ConfigError
from ensembler.generation import check_arguments, check_given_cache
from ensembler.modeling import EnsembleForCausalLM


def reader(model: EnsembleForCausalLM, grid: Grid) -> tuple[Read, Grid]:
    """Return what reads with the members of `model`, and the grid that combines what it returns.

    Of several processes each has some of the members: at one point the ranks' weighted sums are enough.
    """
    if model.world is None or len(grid) > 1:
        return model.member_set.logits, grid.on(model.device)
    ((rule, alphas),) = grid.runs
    combination = make_combination(rule, model.contract, model.config.outside, tuple(model.contract.widths))

    def read(step: Step, cache: Any, forwards: Sequence[Forward] | None) -> dict[str, Tensor]:
        return {rule.anchor: model.member_set.combined(step, cache, combination, alphas[0])}

    return read, grid.of_scores(rule.anchor).on(model.device)


def grid_of(model: EnsembleForCausalLM, points: Sequence[GridPoint] | None, num_rows: int) -> Grid:
    """Return the grid of `points`, or of the model's own α: one, or one for each of `num_rows` rows."""
    if points is not None:
        return Grid.of(points, model.rule, model.contract, model.config.outside)
    alpha = model.alpha_of_rows(num_rows)
    alphas = alpha.tolist() if isinstance(alpha, Tensor) else [alpha]
    return Grid.of_alphas(model.rule, tuple(model.contract.widths), model.combination, alphas)


_logger = logging.getLogger(__name__)

_KNOWN = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "synced_gpus"}


class Decoder:
    """A decoding method for `generate(custom_generate=...)`.

    `points`: the points of a grid, decoded together, for which a GridOutput is returned; each point's text is that of a
    run of it alone. `draft`: a role, 'ngram' (the text's own repetitions), 'auto' (the lightest forward, where one is
    light enough) or 'none'. At most `num_positions` are read in a round, as many as pay; `is_fixed`: always so many.
    `seed`: of sampling (None: drawn from torch's generator in each call); `numbers`: the prompts' numbers, on which
    their noise depends (default: their places in the batch). `streamer` gets the new tokens: `generate` gives its own
    the prompt alone, so pass it here too. `by_row`: processors and criteria of your own are functions of a text,
    and may be asked about some rows of the batch, and about drafts; else `transformers` decodes with them. `stats`
    counts what happens, `meter` times it. Used again, it goes on with the costs and acceptance that it has measured.
    """

    def __init__(
        self,
        draft: str = AUTO,
        *,
        points: Sequence[GridPoint] | None = None,
        num_positions: int = 8,
        is_fixed: bool = False,
        seed: int | None = None,
        numbers: Sequence[int] | None = None,
        streamer: BaseStreamer | None = None,
        meter: Meter | None = None,
        by_row: bool = True,
    ) -> None:
        if num_positions < 1:
            raise ConfigError(f"num_positions is {num_positions}; a round has at least 1, which is a plain step")
        wrong = next((one for one in points or () if not isinstance(one, GridPoint)), None)
        if wrong is not None:
            raise ConfigError(f"points holds {wrong!r}; expected points as make_grid(['base-change'], [0.0, 0.5]) has")
        self.draft = draft
        self.points = None if points is None else tuple(points)
        self.num_positions = num_positions
        self.is_fixed = is_fixed
        self.seed = seed
        self.numbers = numbers
        self.streamer = streamer
        self.meter = meter
        self.stats = DecodingStats() if meter is None else meter.stats
        self._by_row = by_row
        self._pace: Pace | None = None

    def __call__(
        self,
        model: EnsembleForCausalLM,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,  # by name they would reach us twice
    ) -> Any:
        """Decode what `generate` has prepared; return sequences (rows, positions) int64, their output, or a GridOutput.

        Where the loop does not do what was asked, `transformers` decodes, and `stats` and a line of the log say why.
        Raises ConfigError for beams, InputError for arguments that an ensemble cannot honour.
        """
        config = generation_config
        if not isinstance(model, EnsembleForCausalLM):
            raise ConfigError(f"a Decoder was given to a {type(model).__name__}; give it to an EnsembleForCausalLM")
        _check(config, self.points)
        check_arguments({name: value for name, value in model_kwargs.items() if name not in _KNOWN})
        prepared = {
            "input_ids": input_ids,
            "logits_processor": logits_processor,
            "stopping_criteria": stopping_criteria,
            "generation_config": config,
            **model_kwargs,
        }
        reason = why_transformers(model, logits_processor, stopping_criteria, config, model_kwargs, by_row=self._by_row)
        if reason is not None:
            check_given_cache(model_kwargs.get("past_key_values"), reason)
            _logger.info("decoded by transformers' own loop: %s", reason)
            self.stats.add_batch_of_transformers(reason)
            grid = None if self.points is None else grid_of(model, self.points, 1)
            return decode_by_transformers(model, grid, lambda: self._noise(prepared), prepared, self.streamer)
        return _Generation(self, model, **prepared).run()

    def _noise(self, prepared: dict[str, Any]) -> NoiseProcessor:
        return NoiseProcessor(self.make_seed(), prepared["input_ids"].shape[1], *self.numbers_of(prepared))

    def make_seed(self) -> int:
        """Return the seed, or one from torch's generator."""
        return int(torch.randint(2**63 - 1, ())) if self.seed is None else self.seed

    def numbers_of(self, prepared: dict[str, Any]) -> tuple[list[int], list[int]]:
        """Return the numbers of prompt and sample of each row; raises ConfigError where they are not as many."""
        num = prepared["generation_config"].num_return_sequences or 1
        num_prompts = prepared["input_ids"].shape[0] // num
        numbers = range(num_prompts) if self.numbers is None else self.numbers
        if len(numbers) != num_prompts:
            raise ConfigError(f"{len(numbers)} numbers were given for {num_prompts} prompts; give one for each")
        return [number for number in numbers for _ in range(num)], list(range(num)) * num_prompts

    def watching(self, model: EnsembleForCausalLM) -> AbstractContextManager[None]:
        """Let `meter`, if there is one, time all that happens inside."""
        return nullcontext() if self.meter is None else self.meter.watching(model)

    def make_loop(
        self,
        model: EnsembleForCausalLM,
        grid: Grid,
        processors: Processors,
        seed: int | None,
        ends: Ends,
        cache: RowCache,
        *,
        chunk: int | None,
        keeps_rows: bool,
        recorder: Recorder | None = None,
    ) -> DecodeLoop:
        """Return a loop that decodes at the points of `grid`, by sampling where there is a `seed`, with who drafts."""
        read, own = reader(model, grid)
        width = model.contract.widths[model.rule.anchor]
        drafter = find_drafter(model, self.draft, grid, lambda one: Chooser(one, processors, seed, width=width))
        self.stats.plain_reason = drafter if isinstance(drafter, str) else None
        self.stats.draft = None if isinstance(drafter, str) else drafter.name
        return DecodeLoop(
            read,
            cache,
            Chooser(own, processors, seed, recorder=recorder),
            ends,
            drafter=None if isinstance(drafter, str) else drafter,
            chunk=chunk,
            keeps_rows=keeps_rows,
            meter=self.meter,
        )

    def run(self, loop: DecodeLoop) -> list[Text]:
        """Run one step of a loop, with as many positions as pay; return the texts that ended."""
        drafter = loop.drafter
        if drafter is None:
            ended, done = loop.step()
            self.stats.add(done)
            return ended
        self._pace = Pace(self.num_positions, drafter.share) if self._pace is None else self._pace
        most = min(self.num_positions, loop.room)
        ended, done = loop.step(most if self.is_fixed else self._pace.next_round(loop.num_running, most))
        self._pace.saw(done)
        self.stats.add(done)
        self.stats.plain_reason = self._pace.reason
        return ended


class _Generation:
    """One call of `generate` in the decode loop."""

    def __init__(
        self,
        decoder: Decoder,
        model: EnsembleForCausalLM,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> None:
        self._decoder = decoder
        self._ids = input_ids
        self._config = config = generation_config
        self._num_samples = config.num_return_sequences or 1
        self._is_grid = decoder.points is not None
        lengths = [one.max_length for one in stopping_criteria if type(one) is MaxLengthCriteria]
        self._max_length = max(min(lengths), input_ids.shape[1] + 1)
        num_rows = input_ids.shape[0]
        self._members = model.member_set
        self._given = given = model_kwargs.get("past_key_values")
        self._keeps = given is not None or bool(config.return_dict_in_generate)
        grid = grid_of(model, decoder.points, num_rows)
        self._num_points = len(decoder.points or (None,))
        numbers = decoder.numbers_of({"input_ids": input_ids, "generation_config": config})
        self._rows = self._make_rows(model_kwargs.get("attention_mask"), given, len(grid), *numbers)
        self._texts = sorted((text for row in self._rows for text in row.texts), key=lambda text: text.key)
        if given is None:
            given = self._members.row_cache(len(self._rows), self._max_length, input_ids.shape[1])
        self._cache = given
        self._scores: dict[int, dict[int, Tensor]] = {}
        self._logits: dict[int, dict[int, Tensor]] = {}
        recorded = config.return_dict_in_generate and (config.output_scores or config.output_logits)
        processors = Processors(logits_processor, keeps_scores=bool(recorded))
        seed = decoder.make_seed() if config.do_sample else None
        ends = Ends(
            [
                token
                for one in stopping_criteria
                if type(one) is EosTokenCriteria
                for token in one.eos_token_id.tolist()
            ],
            [one for one in stopping_criteria if type(one) not in (EosTokenCriteria, MaxLengthCriteria)],
            device=input_ids.device,
        )
        self._loop = decoder.make_loop(
            model,
            grid,
            processors,
            seed,
            ends,
            self._cache,
            chunk=config.prefill_chunk_size,
            keeps_rows=self._keeps,
            recorder=self._record if recorded else None,
        )
        self._pad = 0 if config._pad_token_tensor is None else int(config._pad_token_tensor)

    def _make_rows(
        self,
        mask: Tensor | None,
        cache: RowCache | None,
        num_points: int,
        prompts: Sequence[int],
        samples: Sequence[int],
    ) -> list[Row]:
        """A row for each prompt, with its samples at all points; with a cache, or α per row, one for each sample."""
        ids = self._ids.tolist()
        seen = None if mask is None else mask.bool().tolist()
        room = self._max_length - self._ids.shape[1]
        by_row = not self._is_grid and num_points > 1
        together = 1 if self._keeps or by_row else self._num_samples
        rows: list[Row] = []
        for first in range(0, len(ids), together):
            kept = [True] * len(ids[first]) if seen is None else seen[first]
            prompt = [token for token, is_seen in zip(ids[first], kept, strict=True) if is_seen]
            texts = [
                Text(place if by_row else point, prompts[place], samples[place], (point, place))
                for point in range(self._num_points)
                for place in range(first, first + together)
            ]
            rows.append(Row(prompt, len(prompt), len(prompt) + room, texts, ids[first], batch_row=first))
            if cache is not None:
                rows[-1].num_read = cache.num_held(first, prompt)
        return rows

    def run(self) -> Any:
        """Decode, and return what `generate` returns."""
        before = [(row.ids, row.num_read) for row in self._rows]
        try:
            output = self._run()
        except BaseException:
            self._leave(before)
            raise
        if self._is_grid:  # what stands on the rows now is of any point
            self._leave(before)
        if self._given is None:
            self._members.keep(self._cache)
        return output

    def _leave(self, held: Sequence[tuple[list[int], int]]) -> None:
        """Leave in the cache what its rows held of the prompts."""
        texts, lengths = zip(*held, strict=True)
        self._cache.empty()
        self._cache.hold(texts, lengths)
        self._cache.forget_behind()

    def _run(self) -> Any:
        rows_per_step = [len(self._rows)]
        stream = Stream(self._decoder.streamer, self._texts, self._pad)
        self._loop.add(self._rows)
        stream.go_on(self._loop.rows)
        while self._loop.room:
            rows_per_step.append(len(self._loop.rows))
            self._decoder.run(self._loop)
            stream.go_on(self._loop.rows)
        self._decoder.stats.num_tokens += sum(len(text.ids) for text in self._texts)
        num_new = max(len(text.ids) for text in self._texts)
        new = [text.ids + [self._pad] * (num_new - len(text.ids)) for text in self._texts]
        prompts = self._ids.repeat(self._num_points, 1)
        sequences = torch.cat([prompts, torch.tensor(new, device=prompts.device)], dim=1)
        if self._is_grid:
            shape = (self._num_points, self._ids.shape[0])
            lengths = torch.tensor([self._ids.shape[1] + len(text.ids) for text in self._texts])
            return GridOutput(sequences.view(*shape, -1), lengths.view(shape), tuple(rows_per_step))
        if not self._config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=self._stacked(self._scores, num_new) if self._config.output_scores else None,
            logits=self._stacked(self._logits, num_new) if self._config.output_logits else None,
            past_key_values=self._cache.copied(len(self._rows)) if self._given is None else self._given,
        )

    def _record(self, asked: Sequence[Asked], logits: Tensor, scores: Tensor) -> None:
        """Keep raw logits and scores (n, V) by position; those behind a rejected draft are written over."""
        for kept, values in ((self._logits, logits), (self._scores, scores)):
            for one, row in zip(asked, values, strict=True):
                kept.setdefault(one.position, {})[one.text.key[1]] = row

    def _stacked(self, kept: dict[int, dict[int, Tensor]], num: int) -> tuple[Tensor, ...]:
        """One tensor (rows, V) for each of `num` positions; 0 behind the end of a text."""
        like = kept[0][0]
        nothing = torch.zeros_like(like)
        lengths = [len(text.ids) for text in self._texts]
        return tuple(
            torch.stack([kept[place][row] if place < length else nothing for row, length in enumerate(lengths)])
            for place in range(num)
        )


def _check(config: GenerationConfig, points: Sequence[GridPoint] | None) -> None:
    if (config.num_beams or 1) > 1:
        raise ConfigError(
            f"num_beams is {config.num_beams}; a grid and a draft work with greedy decoding and with sampling: leave "
            "it at 1"
        )
    if points is not None and config.return_dict_in_generate:
        raise ConfigError("return_dict_in_generate is set; a grid returns a GridOutput: leave it out")
