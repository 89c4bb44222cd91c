"""Give a prompt to members with other tokenizers: each reads the text in tokens, and special tokens, of its own."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence

from ensembler.engine.text_plan import TextPlan, TextReader
from ensembler.errors import PromptError
from ensembler.tokenization.reading import prompt_ids


def spell(plan: TextPlan, ids: Sequence[int]) -> bytes:
    """Return the text of a prompt as ids of the anchor, without the special tokens before it.

    Raises PromptError for a special token inside of it: other members have none of that name.
    """
    texts = plan.anchor.writer.tokens.texts
    first = next((at for at, token in enumerate(ids) if token in texts), len(ids))
    special = next((token for token in ids[first:] if token not in texts), None)
    if special is not None:
        name = plan.anchor.tokenizer.convert_ids_to_tokens(special)
        raise PromptError(
            f"the prompt holds the special token {name!r}, which members with other tokenizers do not know; give plain "
            "text, or a chat (--chat, --apply-chat-template), which each of them reads in its own template"
        )
    spelled = b"".join(texts[token] for token in ids[first:])
    return spelled.removeprefix(b" ") if plan.anchor.has_prefix else spelled


def read_prompt(role: str, reader: TextReader, text: bytes) -> tuple[list[int], bytes]:
    """Return the ids of a prompt for a member, and the bytes behind them of a character that is not whole.

    Raises PromptError where the member's tokenizer changes the text or cannot write it.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    whole = decoder.decode(text)
    rest = decoder.getstate()[0]
    ids = prompt_ids(reader.tokenizer, whole)
    check_reading(role, reader, ids, text[: len(text) - len(rest)])
    return ids, rest


def check_reading(role: str, reader: TextReader, ids: Sequence[int], text: bytes) -> None:
    """Raise PromptError unless `ids` spell the text, behind special tokens, naming the first character that differs."""
    texts: Mapping[int, bytes] = reader.writer.tokens.texts
    first = next((at for at, token in enumerate(ids) if token in texts), len(ids))
    spelled = b"".join(texts.get(token, b"") for token in ids[first:])
    if spelled.endswith(text):
        return
    read = spelled.removeprefix(b" ") if reader.has_prefix else spelled
    at = next(
        (at for at, (one, two) in enumerate(zip(read, text, strict=False)) if one != two), min(len(read), len(text))
    )
    while 0 < at < len(text) and text[at] & 0xC0 == 0x80:  # to where the character begins
        at -= 1
    character = text[at:].decode(errors="replace")[:1]
    raise PromptError(
        f"{role} cannot read {character!r} at byte {at} of the prompt as it stands: its tokenizer changes it or has no "
        "token for it; change the text, or choose a model whose tokens can write any byte"
    )
