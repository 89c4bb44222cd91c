"""Speculative decoding of an ensemble: some of its members draft a few tokens, the others verify them in one forward.

A `SpeculativeDecoder` plugs into `generate(custom_generate=...)`. A round reads k tokens: the drafting forward one
after another, which gives its members' logits at k positions and the tokens to go on with; then every other member all
k in one forward. So each member computes each position once, and the ensemble's distribution is known at all k. Tokens
are settled from left to right, up to the first that is not the drafted one; what the members read behind it is taken
back. The next round begins there: a round of one is a plain step. It does not know texts, files or tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from ensembler.decoding.acceptance import Greedy, Sampling
from ensembler.decoding.choosing import Processors
from ensembler.decoding.drafted_texts import DraftedTexts
from ensembler.decoding.drafting import AUTO, NGRAM, NONE, DraftForward, find_draft
from ensembler.decoding.pacing import Pace
from ensembler.decoding.plain import why_plain
from ensembler.decoding.rounds import Rounds
from ensembler.decoding.slots import Slots
from ensembler.decoding.stats import DecodingStats, Meter
from ensembler.errors import ConfigError
from ensembler.modeling import EnsembleForCausalLM


class SpeculativeDecoder:
    """A decoding method for `generate(custom_generate=...)`: the texts of plain decoding, from fewer forwards.

    `draft`: a role, 'ngram' (the text's own repetitions), 'auto' (the lightest forward, where one is light enough) or
    'none'. At most `num_positions` are read in a round, as many as pay; `is_fixed`: always so many. `seed`: of
    sampling (None: drawn from torch's generator in each call); `numbers`: the prompts' numbers, on which their noise
    depends (default: their places in the batch). `streamer` gets accepted tokens: `generate` hands its own to no
    decoding method, but puts the prompt into it. `stats` counts what happens, `meter` times it. `owns_cache`: a cache
    of several rows that `generate` was given may be left in disorder. Used again, it goes on with the costs and the
    acceptance that it has measured.
    """

    def __init__(
        self,
        draft: str = AUTO,
        *,
        num_positions: int = 8,
        is_fixed: bool = False,
        seed: int | None = None,
        numbers: Sequence[int] | None = None,
        streamer: BaseStreamer | None = None,
        meter: Meter | None = None,
        owns_cache: bool = False,
    ) -> None:
        if num_positions < 1:
            raise ConfigError(f"num_positions is {num_positions}; a round has at least 1, which is a plain step")
        self.draft = draft
        self.num_positions = num_positions
        self.is_fixed = is_fixed
        self.seed = seed
        self.numbers = numbers
        self.streamer = streamer
        self.meter = meter
        self.owns_cache = owns_cache
        self.stats = DecodingStats() if meter is None else meter.stats
        self._pace: Pace | None = None

    def __call__(
        self,
        model: EnsembleForCausalLM,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,  # by name they would reach us twice
    ) -> Tensor:
        """Return prompts and texts (rows, positions) int64; called by `generate`.

        Where drafting is impossible, texts are decoded by `transformers`, and `stats` says why. Raises ConfigError for
        beams, for dictionaries and for a role that cannot draft.
        """
        _check(generation_config)
        drafting = find_draft(model, self.draft)
        cache: Any = model_kwargs.get("past_key_values")
        max_length = generation_config.max_length
        num_kept = 1 if self.owns_cache else input_ids.shape[0]
        reason = why_plain(model, logits_processor, cache, num_kept, input_ids.shape[1], max_length)
        reason = reason or self._why_plain(drafting)
        if reason is not None:
            self.stats.add_undrafted(reason)
            streamer = {} if self.streamer is None else {"streamer": self.streamer}
            sequences: Tensor = model._sample(
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                **streamer,
                **model_kwargs,
            )
            return sequences
        self.stats.draft = NGRAM if drafting is None else "+".join(drafting.forward.roles)
        mask, positions = model_kwargs.get("attention_mask"), model_kwargs["position_ids"]
        pad = generation_config._pad_token_tensor
        rounds = Rounds(
            model,
            drafting,
            DraftedTexts(input_ids, max_length, 0 if pad is None else int(pad), self.streamer),
            Slots(cache, mask, positions, input_ids.shape[0]),
            Processors(logits_processor, slice(None)),
            stopping_criteria,
            self._sampling(input_ids.shape[0], generation_config) if generation_config.do_sample else Greedy(),
            self.meter,
        )
        rounds.prefill(input_ids, mask, positions, generation_config.prefill_chunk_size)
        return self._decode(rounds, self._paced(drafting))

    def watching(self, model: EnsembleForCausalLM) -> AbstractContextManager[None]:
        """What `meter` times, if there is one: all that happens inside."""
        return nullcontext() if self.meter is None else self.meter.watching(model)

    def _decode(self, rounds: Rounds, pace: Pace) -> Tensor:
        """Run rounds until all texts have ended."""
        texts, stats = rounds.texts, self.stats
        while texts.running:
            num_rows = len(texts.running)
            num = min(self.num_positions, texts.room) if self.is_fixed else pace.next_round(num_rows, texts.room)
            done = rounds.run(num)
            pace.saw(done)
            stats.add(done)
            stats.plain_reason = pace.reason
        return texts.sequences()

    def _paced(self, drafting: DraftForward | None) -> Pace:
        """What chooses the positions of a round; it is kept from call to call."""
        if self._pace is None:
            self._pace = Pace(self.num_positions, 0.0 if drafting is None else drafting.share)
        return self._pace

    def _why_plain(self, drafting: DraftForward | None) -> str | None:
        if drafting is not None or self.draft == NGRAM:
            return None
        return "no draft was wanted" if self.draft == NONE else "no member is light enough to draft for the others"

    def _sampling(self, num_rows: int, config: GenerationConfig) -> Sampling:
        num_samples = config.num_return_sequences or 1
        num_prompts = num_rows // num_samples
        numbers = range(num_prompts) if self.numbers is None else self.numbers
        if len(numbers) != num_prompts:
            raise ConfigError(f"{len(numbers)} numbers were given for {num_prompts} prompts; give one for each")
        prompts = torch.tensor(list(numbers)).repeat_interleave(num_samples)
        seed = int(torch.randint(2**63 - 1, ())) if self.seed is None else self.seed
        return Sampling(seed, prompts, torch.arange(num_samples).repeat(num_prompts))


def _check(config: GenerationConfig) -> None:
    if (config.num_beams or 1) > 1:
        raise ConfigError(
            f"num_beams is {config.num_beams}; a draft works with greedy decoding and with sampling: leave it at 1"
        )
    if config.return_dict_in_generate:
        raise ConfigError("return_dict_in_generate is set; drafted texts come as one tensor: leave it out")
