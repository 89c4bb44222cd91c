"""Special tokens by their role in a text, never by the bytes of their names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_ANSWER = "an answer"


def text_ends(tokenizer: Any, ends: Sequence[int]) -> tuple[int, ...]:
    """Return all ids that end a text: `ends`, the tokenizer's end token, and the end of a turn in its chat template."""
    own = [tokenizer.eos_token_id, turn_end(tokenizer)]
    return tuple(dict.fromkeys([*ends, *(token for token in own if token is not None)]))


def turn_end(tokenizer: Any) -> int | None:
    """Return the special token that the chat template writes right behind an answer, or None."""
    if not tokenizer.chat_template:
        return None
    messages = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # templates are programs of the models' authors and raise what they like
        return None
    behind = text.rpartition(_ANSWER)[2].lstrip()
    special = {token: text for token, text in _special(tokenizer).items() if behind.startswith(text)}
    return max(special, key=lambda token: len(special[token]), default=None)


def _special(tokenizer: Any) -> dict[int, str]:
    """Return the names of the special tokens by id."""
    return {token: added.content for token, added in tokenizer.added_tokens_decoder.items() if added.special}
