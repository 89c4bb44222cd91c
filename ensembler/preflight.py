"""Check from configs, tokenizers and file headers, before any weight is read, that an ensemble is possible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils import logging

from ensembler.config import TEXTS, EnsembleConfig, check_roles
from ensembler.engine.members import MemberFiles, check_member, shortest_context, split_backbones
from ensembler.engine.text_plan import TextPlan, TextSettings, plan_text
from ensembler.errors import ConfigError, MemberError, VocabularyError
from ensembler.files import one_line
from ensembler.vocab import (
    MemberVocabulary,
    VocabularyContract,
    end_ids,
    first_difference,
    make_contract,
    read_vocabulary,
    text_roles,
)

_logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class CheckedEnsemble:
    """A configuration whose members, vocabularies and files were found to fit; no weight is loaded.

    `files` holds the members that are to be loaded, `loaded` those that were passed in as models; `model_configs`
    has both, by role. `tokenizer` and `generation_config` are those of the ensemble's folder, or the anchor's; None
    where there are none. The `eos_token_id` of the generation config has all ids that end a text. `text`: how members
    with other tokenizers are asked.
    """

    config: EnsembleConfig
    files: Mapping[str, MemberFiles]
    model_configs: Mapping[str, Any]
    contract: VocabularyContract
    loaded: dict[str, PreTrainedModel] = field(default_factory=dict)
    tokenizer: Any | None = None
    generation_config: GenerationConfig | None = None
    text: TextPlan | None = None

    def require_tokenizer(self) -> Any:
        """Return the anchor's tokenizer, or raise MemberError where it came without one."""
        if self.tokenizer is None:
            anchor = self.config.get_rule().anchor
            raise MemberError(f"{anchor} has no tokenizer files beside its weights; texts need them")
        return self.tokenizer

    @property
    def shortest_context(self) -> tuple[str, int] | None:
        """The role with the shortest context and its length in tokens, or None where no member sets a limit."""
        return shortest_context(self.model_configs)


def check_ensemble(config: EnsembleConfig, loaded: Mapping[str, PreTrainedModel] | None = None) -> CheckedEnsemble:
    """Check every member and the vocabulary contract, and fill in what `config` takes from them.

    `loaded` are members that were passed in as models, without a tokenizer. Raises ConfigError, MemberError or
    VocabularyError.
    """
    if config.task != TEXTS:
        raise ConfigError(
            f"{config.name_or_path or 'this'} is an ensemble of image classifiers, which read no texts; use ensembler "
            "classify, or sweep with --images"
        )
    loaded = dict(loaded or {})
    rule = config.get_rule()
    check_roles(rule, config.members)
    files = {role: check_member(role, config.members[role]) for role in rule.roles if role not in loaded}
    for notice in split_backbones(files):
        _logger.warning(notice)
    model_configs = {role: loaded[role].config if role in loaded else files[role].model_config for role in rule.roles}
    for role in files:  # a path stays right when the working directory changes
        config.members[role] = config.members[role].absolute()
    vocabularies = [
        files[role].vocabulary if role in files else read_vocabulary(role, None, model_configs[role])
        for role in rule.roles
    ]
    contract = make_contract(
        vocabularies,
        allow_renamed_special=config.allow_renamed_special,
        by_text=rule.is_anchor_times_ratio,
    )
    text = _plan_text(config, files, vocabularies) if contract.is_text else None
    text_config = model_configs[rule.anchor].get_text_config(decoder=True)
    config.vocab_size, config.shared_vocab_size = contract.widths[rule.anchor], contract.shared
    shortest = shortest_context(model_configs)
    config.max_position_embeddings = None if shortest is None else shortest[1]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(text_config, name, None))
    anchor = files.get(rule.anchor)
    tokenizer = _read_own(AutoTokenizer, config, "tokenizer_config.json")
    generation_config = _read_own(GenerationConfig, config, "generation_config.json")
    if text is not None and text_roles([vocabularies[0], read_vocabulary("folder", tokenizer, text_config)]):
        tokenizer, generation_config = None, None  # the folder's are of a rule with another anchor
    if anchor is not None:
        tokenizer = tokenizer or anchor.tokenizer
        generation_config = generation_config or anchor.generation_config()
    elif generation_config is None:
        generation_config = deepcopy(getattr(loaded[rule.anchor], "generation_config", None))
    if generation_config is not None:
        _check_ends(config, contract, generation_config, tokenizer)
        if text is not None:  # members ask for the end of a text: it has to end at each of the tokens that stand for it
            ends = [*end_ids(generation_config), *text.anchor.ends]
            generation_config.eos_token_id = list(dict.fromkeys(ends))
            known = tuple(token for token in generation_config.eos_token_id if token < contract.widths[rule.anchor])
            text = replace(text, anchor=replace(text.anchor, ends=known))
        _set_padding(config, contract, generation_config, tokenizer)
    return CheckedEnsemble(config, files, model_configs, contract, loaded, tokenizer, generation_config, text)


def _plan_text(
    config: EnsembleConfig, files: Mapping[str, MemberFiles], vocabularies: Sequence[MemberVocabulary]
) -> TextPlan:
    """Return the plan of members with different tokenizers. Raises VocabularyError, or MemberError for a model."""
    given = next((one.role for one in vocabularies if one.role not in files), None)
    if given is not None:
        raise MemberError(
            f"{given} was given as a model, without a tokenizer; beside other tokenizers, give its folder"
        )
    pair = [one for one in vocabularies if one.role in ("source_ft", "source_pt")]
    if pair and text_roles(pair):
        _logger.warning(
            "source_ft and source_pt have different tokenizers, but a fine-tune has that of its base; check that "
            "source_pt is the model that source_ft was tuned from"
        )
    settings = TextSettings(config.text_candidates, config.text_tolerance, config.chat_template == "anchor")
    try:
        return plan_text(
            config.get_rule(), files, vocabularies, settings, allow_renamed_special=config.allow_renamed_special
        )
    except VocabularyError as error:
        raise VocabularyError(f"{first_difference(vocabularies)}, and {error}") from error


def _check_ends(
    config: EnsembleConfig, contract: VocabularyContract, settings: GenerationConfig, tokenizer: Any
) -> None:
    """Add the tokenizer's end token to those of the generation config, as vLLM and lm-eval do.

    Warn of ends that `outside='mask'` forbids. Raises VocabularyError where it forbids all.
    """
    anchor, own = config.get_rule().anchor, end_ids(settings)
    end = None if tokenizer is None else tokenizer.eos_token_id
    if end is not None and end not in own and end < contract.widths[anchor]:
        settings.eos_token_id = [*own, end]
    ends = end_ids(settings)
    forbidden = [token for token in ends if token >= contract.shared]
    if config.outside != "mask" or not forbidden:
        return
    found = forbidden if tokenizer is None else map(repr, tokenizer.convert_ids_to_tokens(forbidden))
    names = ", ".join(map(str, found))
    if len(forbidden) == len(ends):
        raise VocabularyError(
            f"no end token of {anchor} ({names}) is held by every member (they share {contract.shared:,} ids), so "
            "texts would never end; choose outside='neutral' (--outside neutral)"
        )
    _logger.warning(
        f"texts cannot end at {names} of {anchor}, which not every member holds; choose outside='neutral' (--outside "
        "neutral) where they should"
    )


def _set_padding(
    config: EnsembleConfig, contract: VocabularyContract, settings: GenerationConfig, tokenizer: Any
) -> None:
    """Put an id that every member can read in place of a padding token that there is not."""
    for holder in (config, settings):
        given = holder.pad_token_id
        found = contract.padding_id(given, getattr(tokenizer, "pad_token_id", None), *end_ids(settings))
        holder.pad_token_id = None if given is None else found


def _read_own(kind: Any, config: EnsembleConfig, file: str) -> Any | None:
    """Return what the ensemble's own folder holds in `file`, or None. Raises ConfigError."""
    path = Path(config.name_or_path) / file
    if not config.name_or_path or not path.is_file():
        return None
    try:
        return kind.from_pretrained(config.name_or_path)
    except Exception as error:  # tokenizers raises bare Exceptions for files that it cannot read
        raise ConfigError(f"{path} cannot be read ({one_line(error)}); mend or remove it") from error
