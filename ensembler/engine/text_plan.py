"""Plan an ensemble of members with different tokenizers, before any weight is loaded: who is asked for what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ensembler.engine.members import MemberFiles
from ensembler.errors import MemberError
from ensembler.tokenization.reading import plain_ids, read_writer
from ensembler.tokenization.special_tokens import text_ends
from ensembler.tokenization.token_writer import TokenWriter
from ensembler.vocab import end_ids


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
    """A plan of who is asked for text. `readers`: by role, those of all members but the anchor."""

    anchor_role: str
    anchor: TextReader
    readers: Mapping[str, TextReader]
    settings: TextSettings


def plan_text(anchor: str, files: Mapping[str, MemberFiles], settings: TextSettings) -> TextPlan:
    """Return the plan of checked members. Raises VocabularyError for a tokenizer whose tokens are no pieces of text."""
    readers: dict[str, TextReader] = {}
    for role, member in files.items():
        tokenizer = member.tokenizer
        if tokenizer is None:
            raise MemberError(f"{role} has no tokenizer files beside its weights; other tokenizers need them")
        same = next((one for one in readers.values() if one.tokenizer.get_vocab() == tokenizer.get_vocab()), None)
        writer = read_writer(role, tokenizer) if same is None else same.writer
        ends = text_ends(tokenizer, end_ids(member.generation_config()))
        kept = tuple(token for token in ends if token < member.vocabulary.width)
        begin = writer.tokens.texts.get(plain_ids(tokenizer, "a")[0], b"")
        readers[role] = TextReader(tokenizer, writer, kept, begin.startswith(b" "))
    return TextPlan(anchor, readers.pop(anchor), readers, settings)
