"""How `generate` of `transformers` reaches the decode loop, and its own loop the members' caches."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ensembler_kernels import Combination
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import GenerationMode

from ensembler.config import EnsembleConfig
from ensembler.engine.ensemble_cache import prepare_caches
from ensembler.engine.grid import make_combination
from ensembler.engine.member_set import MemberSet
from ensembler.rules import Rule
from ensembler.vocab import VocabularyContract

_logger = logging.getLogger(__name__)

_ONE_BY_ONE = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


class EnsembleGeneration(GenerationMixin):  # type: ignore[misc,unused-ignore]
    """What an ensemble does otherwise than `GenerationMixin`; its attributes are those of `EnsembleForCausalLM`."""

    config: EnsembleConfig
    contract: VocabularyContract
    member_set: MemberSet
    rule: Rule
    combination: Combination
    _row_alpha: Tensor | None

    def _sample(
        self, input_ids: Tensor, streamer: Any | None = None, synced_gpus: bool = False, **prepared: Any
    ) -> Any:
        """Decode greedily or by sampling, in the decode loop wherever it does what was asked."""
        from ensembler.decoding.decoder import Decoder  # it stands on a higher floor, and generate calls down here

        return Decoder(draft="none", streamer=streamer, by_row=False)(self, input_ids, **prepared)

    def sample_as_transformers(self, input_ids: Tensor, generation_config: GenerationConfig, **prepared: Any) -> Any:
        """Decode greedily or by sampling in `transformers`' own loop, on its own caches."""
        if generation_config.use_cache and prepared.get("past_key_values") is None:
            room = generation_config.max_length - 1
            prepare_caches(
                self.member_set.forwards, generation_config, prepared, GenerationMode.SAMPLE, input_ids.shape[0], room
            )
        return super()._sample(input_ids, generation_config=generation_config, **prepared)

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Let members prepare their caches for beams and assistants; the decode loop makes one when it begins."""
        given = model_kwargs.get("past_key_values")
        if given is not None:
            self.member_set.check_cache(given)
            super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        if generation_mode not in _ONE_BY_ONE:
            _logger.info("decoded by transformers' own loop: %s", generation_mode.value.replace("_", " "))
        if given is None and generation_config.use_cache and generation_mode not in _ONE_BY_ONE:
            prepare_caches(
                self.member_set.forwards, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )

    @contextmanager
    def at(self, rule: Rule, alpha: float) -> Iterator[None]:
        """Be the ensemble of the same members under another rule, and α, inside."""
        before = self.rule, self.combination, self.config.alpha, self._row_alpha
        self.rule = rule
        self.combination = make_combination(rule, self.contract, self.config.outside, tuple(self.contract.widths))
        self.config.alpha, self._row_alpha = alpha, None
        try:
            yield
        finally:
            self.rule, self.combination, self.config.alpha, self._row_alpha = before
