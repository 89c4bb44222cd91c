"""Decoding for `generate`: the decode loop, wherever it does what was asked, else `transformers`' own.

`EnsembleForCausalLM.generate` decodes with a `Decoder` by itself; one of your own, with a draft or with the points of a
grid, is given as `generate(custom_generate=Decoder(...))`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, GenerateDecoderOnlyOutput, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

from ensembler.decoding.by_transformers import decode_by_transformers, why_transformers
from ensembler.decoding.choosing import Chooser, NoiseProcessor, Processors, Recorder, TokenRequest
from ensembler.decoding.decode_stats import DecodingStats, Meter
from ensembler.decoding.drafting import AUTO, DraftSchedule, find_drafter
from ensembler.decoding.loop import DecodeLoop
from ensembler.decoding.rows import Row, Text
from ensembler.decoding.samples import GridOutput, StopChecker, Stream
from ensembler.engine.grid import Grid, GridPoint, make_combination
from ensembler.engine.model_runner import ModelRunner, Step
from ensembler.engine.prefill import Complete, RunMembers
from ensembler.engine.row_cache import RowCache
from ensembler.engine.text_member_set import TextMemberSet
from ensembler.engine.text_states import TextStates
from ensembler.errors import ConfigError
from ensembler.generation import check_arguments, check_given_cache
from ensembler.modeling import EnsembleForCausalLM

_logger = logging.getLogger(__name__)

_KNOWN = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "synced_gpus"}


def grid_of(model: EnsembleForCausalLM, points: Sequence[GridPoint] | None, num_rows: int) -> Grid:
    """Return the grid of `points`, or of the model's own α: one, or one for each of `num_rows` rows."""
    if points is not None:
        return Grid.of(points, model.rule, model.contract, model.config.outside)
    alpha = model.alpha_of_rows(num_rows)
    alphas = alpha.tolist() if isinstance(alpha, Tensor) else [alpha]
    return Grid.of_alphas(model.rule, tuple(model.contract.widths), model.combination, alphas)


def make_seed(seed: int | None) -> int:
    """Return `seed`, or one from torch's generator."""
    return int(torch.randint(2**63 - 1, ())) if seed is None else seed


class Decoder:
    """A decoding method for `generate(custom_generate=...)`.

    `points`: the points of a grid, decoded together, for which a GridOutput is returned; each point's text is that of a
    run of it alone. `draft`: a role, 'ngram' (the text's own repetitions), 'auto' (the lightest member, where one is
    light enough) or 'none'. At most `num_positions` are read in a round, as many as pay; `is_fixed`: always so many.
    `seed`: of sampling (None: drawn from torch's generator in each call); `numbers`: the prompts' numbers, on which
    their noise depends (default: their order in the batch). `streamer` gets the new tokens: `generate` gives its own
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
        self._schedule: DraftSchedule | None = None

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
        if (config.num_beams or 1) > 1:
            raise ConfigError(
                f"num_beams is {config.num_beams}; a grid and a draft work with greedy decoding and with sampling: "
                "leave it at 1"
            )
        if self.points is not None and config.return_dict_in_generate:
            raise ConfigError("return_dict_in_generate is set; a grid returns a GridOutput: leave it out")
        check_arguments({name: value for name, value in model_kwargs.items() if name not in _KNOWN})
        prepared = {
            "input_ids": input_ids,
            "logits_processor": logits_processor,
            "stopping_criteria": stopping_criteria,
            "generation_config": config,
            **model_kwargs,
        }
        reason = why_transformers(model, logits_processor, stopping_criteria, config, model_kwargs, by_row=self._by_row)
        if reason is None:
            return _Generation(self, model, **prepared).run()
        check_given_cache(model_kwargs.get("past_key_values"), reason)
        _logger.info("decoded by transformers' own loop: %s", reason)
        self.stats.add_batch_of_transformers(reason)
        grid = None if self.points is None else grid_of(model, self.points, 1)

        def make_noise() -> NoiseProcessor:
            return NoiseProcessor(make_seed(self.seed), input_ids.shape[1], *self.numbers_of(input_ids, config))

        return decode_by_transformers(model, grid, make_noise, prepared, self.streamer)

    def numbers_of(self, input_ids: Tensor, config: GenerationConfig) -> tuple[list[int], list[int]]:
        """Return the numbers of prompt and sample of each row; raises ConfigError where they are not as many."""
        num = config.num_return_sequences or 1
        num_prompts = input_ids.shape[0] // num
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
        stop_checker: StopChecker,
        cache: RowCache,
        *,
        chunk: int | None,
        keeps_rows: bool,
        recorder: Recorder | None = None,
    ) -> DecodeLoop:
        """Return a loop that decodes at the points of `grid`, by sampling where there is a `seed`, with who drafts."""
        run_members, own = _run_of(model, grid)
        is_greedy = seed is None and not processors and recorder is None
        width = model.contract.widths[model.rule.anchor]
        found = find_drafter(model, self.draft, grid, lambda one: Chooser(one, processors, seed, width=width))
        drafter, self.stats.plain_reason = (None, found) if isinstance(found, str) else (found, None)
        self.stats.draft = None if drafter is None else drafter.name
        chooser = Chooser(own, processors, seed, recorder=recorder)
        return DecodeLoop(
            run_members,
            cache,
            chooser,
            stop_checker,
            drafter=drafter,
            chunk=chunk,
            keeps_rows=keeps_rows,
            meter=self.meter,
            complete=_complete_of(model, grid, cache, is_greedy=is_greedy),
        )

    def run(self, loop: DecodeLoop) -> list[Text]:
        """Run one step of a loop, with as many positions as pay; return the texts that ended."""
        num = 1
        if loop.drafter is not None:
            self._schedule = (
                DraftSchedule(self.num_positions, loop.drafter.share) if self._schedule is None else self._schedule
            )
            most = min(self.num_positions, loop.room)
            num = most if self.is_fixed else self._schedule.next_round(loop.num_running, most)
        ended, done = loop.step(num)
        self.stats.add(done)
        if loop.drafter is not None and self._schedule is not None:
            self._schedule.update(done)
            self.stats.plain_reason = self._schedule.reason
        return ended


def _complete_of(model: EnsembleForCausalLM, grid: Grid, cache: RowCache, *, is_greedy: bool) -> Complete | None:
    """Return what asks members with other tokenizers, if there are any: greedily until the best token is certain.

    Only where `cache` holds a conversation do they go on with what they have read.
    """
    members = model.member_set
    if not isinstance(members, TextMemberSet):
        return None
    if not any(cache.lengths):
        members.forget()
    points = [rule.weights(alpha) for rule, alphas in grid.runs for alpha in alphas]
    return partial(members.completed, states=TextStates(members.text), points=points, is_greedy=is_greedy)


def _run_of(model: EnsembleForCausalLM, grid: Grid) -> tuple[RunMembers, Grid]:
    """Return what runs the members of `model`, and the grid that combines the logits that it returns.

    Of several processes each has some of the members: at one point the ranks' weighted sums are enough, but for members
    that are asked for text.
    """
    if model.world is None or len(grid) > 1 or isinstance(model.member_set, TextMemberSet):
        return model.member_set.logits, grid.to(model.device)
    ((rule, alphas),) = grid.runs
    combination = make_combination(rule, model.contract, model.config.outside, tuple(model.contract.widths))

    def run(step: Step, cache: Any, runners: Sequence[ModelRunner] | None) -> dict[str, Tensor]:
        return {rule.anchor: model.member_set.combined(step, cache, combination, alphas[0])}

    return run, grid.of_scores(rule.anchor).to(model.device)


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
        self._members = model.member_set
        self._given: RowCache | None = model_kwargs.get("past_key_values")
        self._keeps_rows = self._given is not None or bool(config.return_dict_in_generate)
        lengths = [one.max_length for one in stopping_criteria if type(one) is MaxLengthCriteria]
        self._max_length = max(min(lengths), input_ids.shape[1] + 1)
        grid = grid_of(model, decoder.points, input_ids.shape[0])
        self._rows = self._make_rows(model_kwargs.get("attention_mask"), len(grid))
        self._texts = sorted((text for row in self._rows for text in row.texts), key=lambda text: text.key)
        self._cache = self._given or self._members.row_cache(len(self._rows), self._max_length, input_ids.shape[1])
        self._scores: dict[int, dict[int, Tensor]] = {}
        self._logits: dict[int, dict[int, Tensor]] = {}
        is_recorded = bool(config.return_dict_in_generate and (config.output_scores or config.output_logits))
        end_tokens = [one.eos_token_id for one in stopping_criteria if type(one) is EosTokenCriteria]
        others = [one for one in stopping_criteria if type(one) not in (EosTokenCriteria, MaxLengthCriteria)]
        self._loop = decoder.make_loop(
            model,
            grid,
            Processors(logits_processor, keeps_scores=is_recorded),
            make_seed(decoder.seed) if config.do_sample else None,
            StopChecker([token for ids in end_tokens for token in ids.tolist()], others, device=input_ids.device),
            self._cache,
            chunk=config.prefill_chunk_size,
            keeps_rows=self._keeps_rows,
            recorder=self._record if is_recorded else None,
        )
        self._pad = 0 if config._pad_token_tensor is None else int(config._pad_token_tensor)

    def _make_rows(self, mask: Tensor | None, num_alphas: int) -> list[Row]:
        """A row for each prompt, with its samples at all points; with a cache, or α per row, one for each sample."""
        prompts, samples = self._decoder.numbers_of(self._ids, self._config)
        has_alpha_per_row = self._decoder.points is None and num_alphas > 1
        together = 1 if self._keeps_rows or has_alpha_per_row else max(samples) + 1
        room = self._max_length - self._ids.shape[1]
        ids, seen = self._ids.tolist(), (torch.ones_like(self._ids) if mask is None else mask).bool().tolist()
        rows: list[Row] = []
        for first in range(0, len(ids), together):
            prompt = [token for token, is_seen in zip(ids[first], seen[first], strict=True) if is_seen]
            texts = [
                Text(row if has_alpha_per_row else point, prompts[row], samples[row], (point, row))
                for point in range(len(self._decoder.points or (None,)))
                for row in range(first, first + together)
            ]
            rows.append(Row(prompt, len(prompt), len(prompt) + room, texts, ids[first], batch_row=first))
            if self._given is not None:
                rows[-1].num_read = self._given.num_held(first, prompt)
        return rows

    def run(self) -> Any:
        """Decode, and return what `generate` returns."""
        try:
            output = self._run()
        except BaseException:
            self._keep_prompts()
            raise
        if self._decoder.points is not None:  # the cache's rows now hold the texts of any point
            self._keep_prompts()
        if self._given is None:
            self._members.keep(self._cache)
        return output

    def _keep_prompts(self) -> None:
        """Leave in the cache what its rows held of the prompts before."""
        self._cache.empty()
        self._cache.hold([row.ids for row in self._rows], [row.num_read for row in self._rows])
        self._cache.forget_behind()

    def _run(self) -> Any:
        loop, texts, config = self._loop, self._texts, self._config
        rows_per_step = [len(self._rows)]
        stream = Stream(self._decoder.streamer, texts, self._pad)
        loop.add(self._rows)
        stream.go_on(loop.rows)
        while loop.room:
            rows_per_step.append(len(loop.rows))
            self._decoder.run(loop)
            stream.go_on(loop.rows)
        self._decoder.stats.num_tokens += sum(len(text.ids) for text in texts)
        num_new = max(len(text.ids) for text in texts)
        new = [text.ids + [self._pad] * (num_new - len(text.ids)) for text in texts]
        prompts = self._ids.repeat(len(texts) // self._ids.shape[0], 1)
        sequences = torch.cat([prompts, torch.tensor(new, device=prompts.device)], dim=1)
        if self._decoder.points is not None:
            shape = (-1, self._ids.shape[0])
            lengths = torch.tensor([self._ids.shape[1] + len(text.ids) for text in texts])
            return GridOutput(sequences.view(*shape, sequences.shape[1]), lengths.view(shape), tuple(rows_per_step))
        if not config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=self._stacked(self._scores, num_new) if config.output_scores else None,
            logits=self._stacked(self._logits, num_new) if config.output_logits else None,
            past_key_values=self._cache.copied(len(self._rows)) if self._given is None else self._given,
        )

    def _record(self, requests: Sequence[TokenRequest], logits: Tensor, scores: Tensor) -> None:
        """Keep raw logits and scores (n, V) by position; those behind a rejected draft are written over."""
        for kept, values in ((self._logits, logits), (self._scores, scores)):
            for one, row in zip(requests, values, strict=True):
                kept.setdefault(one.position, {})[one.text.key[1]] = row

    def _stacked(self, kept: dict[int, dict[int, Tensor]], num: int) -> tuple[Tensor, ...]:
        """One tensor (rows, V) for each of `num` positions; 0 behind the end of a text."""
        nothing = torch.zeros_like(kept[0][0])
        lengths = [len(text.ids) for text in self._texts]
        return tuple(
            torch.stack([kept[at][row] if at < length else nothing for row, length in enumerate(lengths)])
            for at in range(num)
        )
