"""The vocabulary contract: members may be combined only where an id means the same token in all of them.

Four cases, decided from tokenizer files and configs before any weight is loaded:

    identical   the same tokens, the same width of the vocabulary head
    padded      the same tokens, heads of different widths (Qwen2.5: 151,936 and 152,064)
    extended    the same ids, extra tokens at the end (CodeLlama: 32,016 beside Llama 2: 32,000)
    different   refused; the error names the first ids that disagree
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ensembler.errors import VocabularyError

OUTSIDE_CHOICES = ("mask", "neutral")


@dataclass(frozen=True)
class MemberVocabulary:
    """The vocabulary of one member by its tokenizer and config.

    `tokens` maps token to id (None: the member came without a tokenizer); `width` is the number of logits; the special
    tokens are texts and `substitute` is the id that stands for a token that this member does not hold.
    """

    role: str
    tokens: Mapping[str, int] | None
    width: int
    bos: str | None = None
    eos: str | None = None
    chat_template: str | None = None
    substitute: int = 0

    @property
    def num_ids(self) -> int:
        """One more than the largest id that is a token (the width, where the tokenizer is not known)."""
        return max(self.tokens.values(), default=-1) + 1 if self.tokens is not None else self.width

    def by_id(self) -> dict[int, str]:
        """The tokens by their ids."""
        return {i: token for token, i in (self.tokens or {}).items()}


@dataclass(frozen=True)
class VocabularyContract:
    """The vocabulary that the members agree on. Ids below `shared` mean the same token in every member.

    By role: `widths`, the number of logits; `held`, the number of ids that are tokens of this member; `substitutes`,
    the id that stands for tokens which it does not hold.
    """

    kind: str
    shared: int
    widths: Mapping[str, int]
    held: Mapping[str, int]
    substitutes: Mapping[str, int]
    notes: tuple[str, ...] = ()


def read_vocabulary(role: str, tokenizer: Any | None, config: Any) -> MemberVocabulary:
    """Return the vocabulary of a member from its `transformers` tokenizer (or None) and its model config."""
    width = int(config.get_text_config(decoder=True).vocab_size)
    if tokenizer is None:
        return MemberVocabulary(role, None, width)
    candidates = (tokenizer.unk_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)
    return MemberVocabulary(
        role=role,
        tokens=tokenizer.get_vocab(),
        width=width,
        bos=tokenizer.bos_token,
        eos=tokenizer.eos_token,
        chat_template=str(tokenizer.chat_template) if tokenizer.chat_template else None,
        substitute=next((token for token in candidates if token is not None and token < width), 0),
    )


def make_contract(members: Sequence[MemberVocabulary]) -> VocabularyContract:
    """Compare every member with the first, the anchor; raise VocabularyError where their ids disagree."""
    anchor = members[0]
    known = [member for member in members if member.tokens is not None]
    for member in known[1:]:
        _check_same_ids(known[0], member)
    same_tokens = len({len(member.tokens or ()) for member in known}) <= 1
    widths = {member.role: member.width for member in members}
    held = {member.role: min(member.width, member.num_ids) for member in members}
    same_widths = len(set(widths.values())) == 1
    return VocabularyContract(
        kind="extended" if not same_tokens else "identical" if same_widths else "padded",
        shared=min(held.values()),
        widths=widths,
        held=held,
        substitutes={member.role: member.substitute for member in members},
        notes=tuple(_notes(anchor, members)),
    )


def _check_same_ids(first: MemberVocabulary, other: MemberVocabulary) -> None:
    """Raise unless the smaller vocabulary is the beginning of the larger."""
    if first.tokens == other.tokens:
        return
    end = min(first.num_ids, other.num_ids)
    firsts, others = first.by_id(), other.by_id()
    differing = [i for i in range(end) if firsts.get(i) != others.get(i)]
    if not differing:
        return
    shown = ", ".join(f"{i} is {firsts.get(i)!r} and {others.get(i)!r}" for i in differing[:3])
    raise VocabularyError(
        f"the tokenizers of {first.role} and {other.role} differ in {len(differing):,} of {end:,} ids: {shown}; "
        "members must share a vocabulary, so choose models of one tokenizer family"
    )


def _notes(anchor: MemberVocabulary, members: Sequence[MemberVocabulary]) -> list[str]:
    """Differences that are reported and not resolved: special tokens, chat templates, unknown tokenizers."""
    notes = []
    for member in members:
        if member.tokens is None:
            notes.append(f"{member.role} came without a tokenizer: only widths were compared")
        elif member is not anchor and anchor.tokens is not None:
            for name in ("bos", "eos"):
                mine, theirs = getattr(member, name), getattr(anchor, name)
                if mine != theirs:
                    notes.append(f"{name} of {member.role} is {mine!r}; the anchor's, {theirs!r}, is used")
            if member.chat_template != anchor.chat_template:
                notes.append(f"chat template of {member.role} differs from the anchor's, which is used")
    return notes
