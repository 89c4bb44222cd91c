"""At which α an ensemble decodes, and how `generate` of `transformers` reaches the decode loop."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any

from ensembler_kernels import Combination
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import GenerationMode

from ensembler.config import EnsembleConfig
from ensembler.engine.ensemble_cache import prepare_caches, roles_to_reread, why_not_in_pieces
from ensembler.engine.grid import combine_members, make_combination
from ensembler.engine.member_set import MemberSet
from ensembler.engine.model_runner import ModelRunner
from ensembler.engine.row_cache import RowCache
from ensembler.errors import ConfigError, InputError
from ensembler.rules import Rule
from ensembler.vocab import VocabularyContract

_logger = logging.getLogger(__name__)

_ONE_BY_ONE = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
_LEFT_BY_GENERATE = {"tokenizer", "assistant_tokenizer"}  # generate hands its own arguments on to forward
_IGNORED = {"token_type_ids", "cache_position"}  # by models that do not name them; tokenizers and old loops give them
_OF_SINGLE_MODELS = {"inputs_embeds", "output_attentions", "output_hidden_states"}


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
        return combine_members(logits, self.combination, self.alpha_of_rows(num_rows, alpha), self.contract.widths)

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
        prepared["use_cache"] = generation_config.use_cache
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
        if generation_mode is GenerationMode.ASSISTED_GENERATION:
            check_unscaled(self.member_set, max_cache_length)
        reason = generation_mode.value.replace("_", " ")
        check_given_cache(given, reason)
        _logger.info("decoded by transformers' own loop: %s", reason)
        if given is None and generation_config.use_cache:
            prepare_caches(
                self.member_set.runners, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )

    def init_continuous_batching(self, *args: Any, **options: Any) -> Any:
        """Refused: it pages the keys and values of one model."""
        raise InputError(
            "an ensemble has no continuous batching in transformers (generate_batch), which pages the cache of one "
            "model; call generate on padded batches, or serve the folder with vLLM"
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the arguments of `forward` for the next tokens, or for all where a member reads a text anew."""
        roles = roles_to_reread(past_key_values, self.member_set.runners, attention_mask, next_sequence_length)
        if roles:
            past_key_values.read_anew(roles, next_sequence_length)
            next_sequence_length = None
        given = {"past_key_values": past_key_values, "attention_mask": attention_mask, **kwargs}
        return super().prepare_inputs_for_generation(input_ids, next_sequence_length, **given)

    def _prefill(self, input_ids: Tensor, generation_config: GenerationConfig, model_kwargs: Any, **others: Any) -> Any:
        """Read the prompts, in pieces only where members give the same logits then."""
        if generation_config.prefill_chunk_size is not None:
            reason = why_not_in_pieces(self.member_set.runners)
            if reason is not None:
                _logger.info("prompts are read whole, whatever prefill_chunk_size is: %s", reason)
                generation_config = copy(generation_config)
                generation_config.prefill_chunk_size = None
        return super()._prefill(input_ids, generation_config, model_kwargs, **others)

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


def check_unscaled(members: MemberSet, length: int) -> None:
    """Raise InputError where assistants draft texts of up to `length` tokens, and positions are scaled by a length.

    What stands behind a rejected draft is taken back; the positions of what stands before it would have to be, too.
    """
    for runner in members.runners:
        if runner.scale is not None and length > runner.scale.unscaled:
            raise InputError(
                f"an assistant drafts texts of up to {length + 1:,} tokens, and {' and '.join(runner.roles)} scales "
                f"positions beyond {runner.scale.unscaled:,}; draft with custom_generate=Decoder('ngram') instead"
            )


def check_arguments(unused: Mapping[str, Any], runners: Sequence[ModelRunner] = ()) -> None:
    """Raise InputError for arguments that an ensemble cannot honour; None and False ask for nothing.

    `runners`: of the members, some of which may read what `transformers` lets others ignore.
    """
    for name, value in unused.items():
        if value is None or value is False or name in _LEFT_BY_GENERATE:
            continue
        readers = [runner.name for runner in runners if name in runner.accepts]
        if name in _IGNORED and not readers:
            continue
        if name in _OF_SINGLE_MODELS:
            reason = "its members differ in hidden size and layers"
        elif 0 < len(readers) < len(runners):
            reason = f"of its members only {' and '.join(readers)} would read it"
        else:
            reason = "no member would get it; leave it out"
        raise InputError(f"an ensemble takes no {name!r} here; {reason}")
