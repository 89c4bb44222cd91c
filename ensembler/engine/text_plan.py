"""Plan an ensemble of members with different tokenizers, before any weight is loaded: who is asked for what."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ensembler.engine.members import MemberFiles
from ensembler.errors import MemberError
from ensembler.rules import Rule
from ensembler.tokenization.reading import plain_ids, read_writer
from ensembler.tokenization.special_tokens import text_ends
from ensembler.tokenization.token_writer import TokenWriter
from ensembler.vocab import MemberVocabulary, VocabularyContract, end_ids, make_contract, text_roles

_PARTS = ("added_tokens", "normalizer", "pre_tokenizer", "decoder", "model")  # of a tokenizer.json, without padding


@dataclass(frozen=True)
class TextSettings:
    """`num_candidates`: the anchor's most probable next tokens that are compared, besides its end; `tolerance`: the
    share of their probabilities that may stay open; `anchor_chats`: all members read chats in the anchor's template."""

    num_candidates: int
    tolerance: float
    anchor_chats: bool


@dataclass(frozen=True)
class TextReader:
    """A member that is asked for text: its tokenizer, how that writes, and the ids that end a text.

    `has_prefix`: the tokenizer puts a space before a text.
    """

    tokenizer: Any
    writer: TokenWriter
    ends: tuple[int, ...]
    has_prefix: bool = False


@dataclass(frozen=True)
class TextPlan:
    """A plan of who is asked for text. `readers`: by role, those of all members that have not the anchor's tokenizer.

    `roles`: all of them, as combinations take them. `contract`: of the anchor and the members that share its tokenizer.
    `raised`: the roles whose weight grows with α.
    """

    roles: tuple[str, ...]
    anchor_role: str
    anchor: TextReader
    readers: Mapping[str, TextReader]
    contract: VocabularyContract
    raised: frozenset[str]
    settings: TextSettings


def plan_text(
    rule: Rule,
    files: Mapping[str, MemberFiles],
    vocabularies: Sequence[MemberVocabulary],
    settings: TextSettings,
    *,
    allow_renamed_special: bool = False,
) -> TextPlan:
    """Return the plan of checked members, with their `vocabularies` in the order of the rule's roles.

    Raises VocabularyError for a tokenizer whose tokens are no pieces of text.
    """
    anchor, others = rule.anchor, text_roles(vocabularies)
    readers: dict[str, TextReader] = {}
    for role in (anchor, *others):
        member = files[role]
        tokenizer = member.tokenizer
        if tokenizer is None:
            raise MemberError(f"{role} has no tokenizer files beside its weights; other tokenizers need them")
        same = next((one for one in readers.values() if _are_alike(one.tokenizer, tokenizer)), None)
        writer = read_writer(role, tokenizer) if same is None else same.writer
        ends = text_ends(tokenizer, end_ids(member.generation_config()))
        kept = tuple(token for token in ends if token < member.vocabulary.width)
        begin = writer.tokens.texts.get(plain_ids(tokenizer, "a")[0], b"")
        readers[role] = TextReader(tokenizer, writer, kept, begin.startswith(b" "))
    own = [one for one in vocabularies if one.role not in others]
    contract = make_contract(own, allow_renamed_special=allow_renamed_special)
    raised = frozenset(role for role, slope in rule.slope.items() if slope > 0)
    return TextPlan(tuple(rule.roles), anchor, readers.pop(anchor), readers, contract, raised, settings)


def _are_alike(one: Any, other: Any) -> bool:
    """Return whether two tokenizers write all texts alike, as far as it can be known."""
    if not (getattr(one, "is_fast", False) and getattr(other, "is_fast", False)):
        return False
    texts = [tokenizer.backend_tokenizer.to_str() for tokenizer in (one, other)]
    if texts[0] == texts[1] or one.get_vocab() != other.get_vocab():
        return bool(texts[0] == texts[1])
    first, second = map(json.loads, texts)
    return all(first.get(part) == second.get(part) for part in _PARTS)
