"""At which α an ensemble decodes, and how `generate` of `transformers` reaches the decode loop."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ensembler_kernels import Combination
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import GenerationMode

from ensembler.config import EnsembleConfig
from ensembler.engine.ensemble_cache import prepare_caches
from ensembler.engine.grid import combine_members, make_combination
from ensembler.engine.member_set import MemberSet
from ensembler.engine.row_cache import RowCache
from ensembler.errors import ConfigError, InputError
from ensembler.rules import Rule
from ensembler.vocab import VocabularyContract

_logger = logging.getLogger(__name__)

_ONE_BY_ONE = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
_LEFT_BY_GENERATE = {"tokenizer", "assistant_tokenizer"}  # generate hands its own arguments on to forward


class FixedRule:
    """The rule of an ensemble: what its members and their vocabulary contract were checked for."""

    _rule: Rule

    @property
    def rule(self) -> Rule:
        """The rule that combines the members; it cannot be assigned."""
        return self._rule

    @rule.setter
    def rule(self, value: object) -> None:
        raise ConfigError(
            f"the rule of a loaded ensemble stays {self._rule.name!r}; load its folder with from_pretrained(folder, "
            "rule=...), or give the members to from_members(rule=...)"
        )


class EnsembleGeneration(FixedRule, GenerationMixin):  # type: ignore[misc,unused-ignore]
    """α, and how `GenerationMixin` samples and prepares caches; its attributes are those of `EnsembleForCausalLM`."""

    config: EnsembleConfig
    contract: VocabularyContract
    member_set: MemberSet
    combination: Combination
    _row_alpha: Tensor | None

    @property
    def alpha(self) -> float | Tensor:
        """The strength of the log-ratio: a number, or a tensor (rows,) with one value per row."""
        return float(self.config.alpha) if self._row_alpha is None else self._row_alpha

    @alpha.setter
    def alpha(self, value: float | Tensor) -> None:
        if isinstance(value, list | tuple):
            raise ConfigError(f"alpha is {value}; expected a number, or a tensor with one value per row")
        if not isinstance(value, Tensor) or value.dim() == 0:
            self.config.alpha = self.rule.check_alpha(value.item() if isinstance(value, Tensor) else value)
            self._row_alpha = None
            return
        if value.dim() > 1 or not value.numel():
            raise ConfigError(f"alpha has shape {tuple(value.shape)}; expected a number or one value per row")
        for number in value.tolist():
            self.rule.check_alpha(number)
        self._row_alpha = value

    def combine(self, logits: Mapping[str, Tensor], alpha: float | Tensor | None = None) -> Tensor:
        """Return the combination of member logits (rows, positions, V_member) by the rule, (rows, positions, V) fp32.

        `alpha` defaults to the ensemble's; one value per row is repeated for beams and for several returned sequences.
        """
        num_rows = next(iter(logits.values())).shape[0]
        return combine_members(logits, self.combination, self.alpha_of_rows(num_rows, alpha), self.contract)

    def alpha_of_rows(self, num_rows: int, alpha: float | Tensor | None = None) -> float | Tensor:
        """Return `alpha`, or the ensemble's, as a number or as one value for each of `num_rows` rows."""
        alpha = self.alpha if alpha is None else alpha
        if not isinstance(alpha, Tensor):
            return alpha
        repeats, rest = divmod(num_rows, alpha.shape[0])  # beams and returned sequences of a row stand side by side
        if rest:
            raise InputError(
                f"alpha has {alpha.shape[0]} values for {num_rows} rows; expected one per row of the batch"
            )
        return alpha.repeat_interleave(repeats)

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
                self.member_set.runners, generation_config, prepared, GenerationMode.SAMPLE, input_ids.shape[0], room
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
        if generation_mode in _ONE_BY_ONE:
            return
        reason = generation_mode.value.replace("_", " ")
        check_given_cache(given, reason)
        _logger.info("decoded by transformers' own loop: %s", reason)
        if given is None and generation_config.use_cache:
            prepare_caches(
                self.member_set.runners, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )

    @contextmanager
    def at(self, rule: Rule, alpha: float) -> Iterator[None]:
        """Be the ensemble of the same members under another rule, and α, inside."""
        before = self._rule, self.combination, self.config.alpha, self._row_alpha
        self._rule = rule
        self.combination = make_combination(rule, self.contract, self.config.outside, tuple(self.contract.widths))
        self.config.alpha, self._row_alpha = alpha, None
        try:
            yield
        finally:
            self._rule, self.combination, self.config.alpha, self._row_alpha = before


def check_given_cache(cache: object, reason: str) -> None:
    """Raise InputError for a RowCache where `transformers`' own loop decodes, which cannot read it."""
    if isinstance(cache, RowCache):
        raise InputError(
            f"past_key_values is a RowCache, and transformers' own loop decodes here ({reason}); leave it out"
        )


def check_arguments(unused: Mapping[str, Any]) -> None:
    """Raise InputError for arguments that an ensemble cannot honour; None and False ask for nothing."""
    for name, value in unused.items():
        if value is not None and value is not False and name not in _LEFT_BY_GENERATE:
            raise InputError(f"an ensemble's forward takes no {name!r}; its members differ in hidden size and layers")
