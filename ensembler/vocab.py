"""The vocabulary contract: members may be combined only where an id means the same token in all of them.

Six cases, decided from tokenizer files and configs before any weight is loaded:

    identical   the same tokens, the same width of the vocabulary head
    renamed     the same ids, some added tokens under other names (a distilled Qwen beside Qwen2.5); refused by default
    padded      the same tokens, heads of different widths (Qwen2.5: 151,936 and 152,064)
    extended    the same ids, extra tokens at the end (CodeLlama: 32,016 beside Llama 2: 32,000)
    text        other tokenizers: members with another than the anchor's are asked for text (`engine.text_member`)
    different   the same where the rule is no ratio of members: refused; the error names the first ids that disagree
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ensembler.errors import VocabularyError

OUTSIDE_CHOICES = ("mask", "neutral")
CHAT_TEMPLATES = ("per-member", "anchor")
TEXT = "text"


@dataclass(frozen=True)
class MemberVocabulary:
    """The vocabulary of one member by its tokenizer and config.

    `tokens` maps token to id (None: the member came without a tokenizer); `width` is the number of logits; the special
    tokens are texts and `substitute` is the id that stands for a token that this member does not hold. `added`: the ids
    of tokens that were added to the tokenizer, all special ones among them.
    """

    role: str
    tokens: Mapping[str, int] | None
    width: int
    bos: str | None = None
    eos: str | None = None
    chat_template: str | None = None
    substitute: int = 0
    added: frozenset[int] = frozenset()

    @property
    def num_ids(self) -> int:
        """One more than the largest id that is a token (the width, where the tokenizer is not known)."""
        return max(self.tokens.values(), default=-1) + 1 if self.tokens is not None else self.width


@dataclass(frozen=True)
class VocabularyContract:
    """The vocabulary that the members agree on. Ids below `shared` mean the same token in every member.

    By role: `widths`, the number of logits; `held`, the number of ids that are tokens of this member; `substitutes`,
    the id that stands for tokens which it does not hold. `num_ids`: one more than the largest id of any tokenizer.
    """

    kind: str
    shared: int
    widths: Mapping[str, int]
    held: Mapping[str, int]
    substitutes: Mapping[str, int]
    notes: tuple[str, ...] = ()
    num_ids: int = 0

    @property
    def is_text(self) -> bool:
        """Return whether some members are asked for bytes of text, not for ids."""
        return self.kind == TEXT

    def lacks_ids(self, role: str) -> bool:
        """Return whether there are ids that this member does not hold."""
        return self.held[role] < max(self.num_ids, *self.held.values())

    def known_ids(self, role: str, ids: Any) -> Any:
        """Return a tensor of ids as the member knows them: its substitute in place of those that it does not hold."""
        return ids.where(ids < self.held[role], self.substitutes[role]) if self.lacks_ids(role) else ids

    def padding_id(self, *candidates: int | None) -> int:
        """Return the first of `candidates` that every member can read by `known_ids`, or 0."""
        most = max(self.num_ids, *self.held.values())
        return next((token for token in candidates if token is not None and 0 <= token < most), 0)


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
        added=frozenset(tokenizer.added_tokens_decoder),
    )


def end_ids(generation_config: Any) -> tuple[int, ...]:
    """Return the ids that end a text: the `eos_token_id` of a generation config (a number, a list, None or −1)."""
    given = generation_config.eos_token_id
    ends = [] if given is None else given if isinstance(given, list | tuple) else [given]
    return tuple(token for token in ends if token >= 0)


def make_contract(
    members: Sequence[MemberVocabulary], *, allow_renamed_special: bool = False, by_text: bool = False
) -> VocabularyContract:
    """Compare every member with the first, the anchor; raise VocabularyError where their ids disagree.

    With `by_text`, members one of which has other ordinary tokens are compared by text: the contract is then over the
    ids of the anchor.

    With `allow_renamed_special`, an added token of another name counts as the same below the shared ids; beyond them, a
    member does not hold what the anchor calls otherwise. Both are listed in the notes.
    """
    known = [member for member in members if member.tokens is not None]
    widths = {member.role: member.width for member in members}
    held = {member.role: min(member.width, member.num_ids) for member in members}
    shared = min(held.values())
    renamed = []
    if by_text and text_roles(members):
        return _text_contract(members)
    for other in known[1:]:
        conflicts = [] if other.tokens == known[0].tokens else _conflicts(known[0], other)
        if not conflicts:
            continue
        _check_renamed(known[0], other, conflicts, shared, allowed=allow_renamed_special)
        renamed.append(f"other tokens at ids of {known[0].role} and {other.role}: {_listed(conflicts)}")
        held[other.role] = min([held[other.role], *(i for i, *_ in conflicts if i >= shared)])
    is_extended = len({len(member.tokens or ()) for member in known}) > 1
    kinds = {"renamed": renamed, "extended": is_extended, "padded": len(set(widths.values())) > 1}
    return VocabularyContract(
        kind=next((kind for kind, is_so in kinds.items() if is_so), "identical"),
        shared=shared,
        widths=widths,
        held=held,
        substitutes={one.role: one.substitute if one.substitute < held[one.role] else 0 for one in members},
        notes=(*renamed, *_notes(members)),
        num_ids=max(member.num_ids for member in members),
    )


Conflict = tuple[int, str | None, str | None]  # an id, and the token of each of two members (None: there is none)


def _conflicts(first: MemberVocabulary, other: MemberVocabulary) -> list[Conflict]:
    """Return where the smaller vocabulary is not the beginning of the larger."""
    one, two = ({i: token for token, i in (member.tokens or {}).items()} for member in (first, other))
    pairs = ((i, one.get(i), two.get(i)) for i in range(min(first.num_ids, other.num_ids)))
    return [(i, token, name) for i, token, name in pairs if token != name]


def _ordinary(first: MemberVocabulary, other: MemberVocabulary, shared: int) -> list[Conflict]:
    """Return the conflicts of two ordinary tokens of all members."""
    if other.tokens == first.tokens:
        return []
    added = first.added | other.added
    return [one for one in _conflicts(first, other) if one[0] < shared and one[0] not in added]


def _text_contract(members: Sequence[MemberVocabulary]) -> VocabularyContract:
    """Return the contract of members whose logits all come in the ids of the anchor."""
    anchor = members[0]
    held = min(anchor.width, anchor.num_ids)
    return VocabularyContract(
        kind=TEXT,
        shared=anchor.width,
        widths={member.role: anchor.width for member in members},
        held={member.role: held for member in members},
        substitutes={member.role: anchor.substitute if anchor.substitute < held else 0 for member in members},
        notes=tuple(note for note in _notes(members) if note.startswith(f"{anchor.role} has")),
        num_ids=anchor.num_ids,
    )


def _check_renamed(
    first: MemberVocabulary, other: MemberVocabulary, conflicts: Sequence[Conflict], shared: int, *, allowed: bool
) -> None:
    """Raise VocabularyError unless conflicts are `allowed` and none is of two ordinary tokens of all members."""
    ordinary = _ordinary(first, other, shared)
    if allowed and not ordinary:
        return
    remedy = "choose models of one tokenizer family, or the rule base-change or eft, which compare texts"
    if not ordinary:
        remedy = "choose models of one tokenizer family"
        remedy += ", or allow these: allow_renamed_special=True (--allow-renamed-special)"
    raise VocabularyError(f"{_difference(first, other)}; members of this rule must share a vocabulary, so {remedy}")


def text_roles(members: Sequence[MemberVocabulary]) -> list[str]:
    """Return the roles that have other ordinary tokens than the first member, the anchor."""
    known = [member for member in members if member.tokens is not None]
    shared = min(min(member.width, member.num_ids) for member in members)
    return [other.role for other in known[1:] if _ordinary(known[0], other, shared)]


def first_difference(members: Sequence[MemberVocabulary]) -> str:
    """Return a clause that names the first member whose ordinary tokens are not the anchor's, and some of these."""
    known = [member for member in members if member.tokens is not None]
    shared = min(min(member.width, member.num_ids) for member in members)
    other = next(member for member in known[1:] if _ordinary(known[0], member, shared))
    return _difference(known[0], other)


def _difference(first: MemberVocabulary, other: MemberVocabulary) -> str:
    conflicts = _conflicts(first, other)
    shared = min(first.num_ids, other.num_ids)
    shown = (_ordinary(first, other, shared) or conflicts)[:3]
    return (
        f"the tokenizers of {first.role} and {other.role} differ in {len(conflicts):,} of {shared:,} ids: "
        f"{_listed(shown)}"
    )


def _listed(conflicts: Sequence[Conflict]) -> str:
    return ", ".join(f"{i} is {one!r} and {two!r}" for i, one, two in conflicts)


def _notes(members: Sequence[MemberVocabulary]) -> Iterator[str]:
    """Yield differences that are reported and not resolved: special tokens, chat templates, unknown tokenizers."""
    anchor = members[0]
    for member in members:
        if member.num_ids > member.width:
            tokens = sorted((i, token) for token, i in (member.tokens or {}).items() if i >= member.width)
            yield (
                f"{member.role} has {member.width:,} embeddings and none for {tokens[0][1]!r} ({tokens[0][0]})"
                f"{f' and {len(tokens) - 1} more tokens' * (len(tokens) > 1)} of its tokenizer: it reads id "
                f"{member.substitute} in their place"
            )
        if member.tokens is None:
            yield f"{member.role} came without a tokenizer: only widths were compared"
        elif anchor.tokens is not None:
            for name in ("bos", "eos"):
                own, used = getattr(member, name), getattr(anchor, name)
                if own != used:
                    yield f"{name} of {member.role} is {own!r}; the anchor's, {used!r}, is used"
            if member.chat_template != anchor.chat_template:
                yield f"chat template of {member.role} differs from the anchor's, which is used"
