"""The vocabulary contract: members may be combined only where an id means the same token in all of them.

Four cases, decided from tokenizer files and configs before any weight is loaded:

    identical   the same tokens, the same width of the vocabulary head
    padded      the same tokens, heads of different widths (Qwen2.5: 151,936 and 152,064)
    extended    the same ids, extra tokens at the end (CodeLlama: 32,016 beside Llama 2: 32,000)
    different   refused; the error names the first ids that disagree
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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

    def lacks_ids(self, role: str) -> bool:
        """Return whether another member holds ids that are no tokens of this one."""
        return self.held[role] < max(self.held.values())

    def known_ids(self, role: str, ids: Any) -> Any:
        """Return a tensor of ids as the member knows them: its substitute in place of those that it does not hold."""
        return ids.where(ids < self.held[role], self.substitutes[role]) if self.lacks_ids(role) else ids


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
    known = [(member, member.tokens) for member in members if member.tokens is not None]
    for other, tokens in known[1:]:
        first, own = known[0]
        if tokens != own:
            _check_same_ids(first, other)
    widths = {member.role: member.width for member in members}
    held = {member.role: min(member.width, member.num_ids) for member in members}
    is_extended = len({len(tokens) for _, tokens in known}) > 1
    return VocabularyContract(
        kind="extended" if is_extended else "padded" if len(set(widths.values())) > 1 else "identical",
        shared=min(held.values()),
        widths=widths,
        held=held,
        substitutes={member.role: member.substitute for member in members},
        notes=tuple(_notes(members)),
    )


def _check_same_ids(first: MemberVocabulary, other: MemberVocabulary) -> None:
    """Raise unless the smaller vocabulary is the beginning of the larger."""
    one, two = ({i: token for token, i in (member.tokens or {}).items()} for member in (first, other))
    end = min(first.num_ids, other.num_ids)
    differing = [i for i in range(end) if one.get(i) != two.get(i)]
    if differing:
        shown = ", ".join(f"{i} is {one.get(i)!r} and {two.get(i)!r}" for i in differing[:3])
        raise VocabularyError(
            f"the tokenizers of {first.role} and {other.role} differ in {len(differing):,} of {end:,} ids: {shown}; "
            "members must share a vocabulary, so choose models of one tokenizer family"
        )


def _notes(members: Sequence[MemberVocabulary]) -> Iterator[str]:
    """Yield differences that are reported and not resolved: special tokens, chat templates, unknown tokenizers."""
    anchor = members[0]
    for member in members:
        if member.tokens is None:
            yield f"{member.role} came without a tokenizer: only widths were compared"
        elif anchor.tokens is not None:
            for name in ("bos", "eos"):
                own, used = getattr(member, name), getattr(anchor, name)
                if own != used:
                    yield f"{name} of {member.role} is {own!r}; the anchor's, {used!r}, is used"
            if member.chat_template != anchor.chat_template:
                yield f"chat template of {member.role} differs from the anchor's, which is used"
