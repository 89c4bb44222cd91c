"""Files of JSON lines that transports of patches read: labelled examples, and plain texts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ensembler.decoding.prompts import Line, read_lines, text_ids
from ensembler.errors import PromptError
from ensembler.evaluation.requests import encode_request
from ensembler.patch.transports.transport import Calibration, Example

_LABELLED = 'expected lines such as {"prompt": "...", "answer": "..."}'
_TEXTS = 'expected lines such as {"text": "..."}'


def labelled_examples(path: Path) -> Calibration:
    """Return the examples of a file of JSON lines with `prompt` and `answer`.

    A space is put before an answer unless the prompt ends in white space or the answer begins with it; prompt and
    answer are encoded as one text and parted as in scoring. Raises PromptError with line and field.
    """
    rows = _read(path, _labelled, f"labelled examples; {_LABELLED}")

    def encode(tokenizer: Any) -> list[Example]:
        examples = []
        for number, (prompt, answer, source) in enumerate(rows):
            gap = "" if prompt[-1:].isspace() or answer[:1].isspace() else " "
            request = encode_request(tokenizer, prompt, [gap + answer], source, number)
            examples.append(Example(request.context, request.continuations[0], source))
        return examples

    return Calibration(path, len(rows), encode)


def plain_texts(path: Path) -> Calibration:
    """Return the texts of a file of JSON lines, each with `text` or a JSON string. Raises PromptError with the line."""
    rows = _read(path, _text, f"texts; {_TEXTS}")

    def encode(tokenizer: Any) -> list[Example]:
        return [Example(tuple(text_ids(tokenizer, text)), (), source) for text, source in rows]

    return Calibration(path, len(rows), encode)


def _read(path: Path, parse: Callable[[Any, int, str], Line], holds: str) -> list[Line]:
    def refuse(message: str) -> None:
        raise PromptError(f"{message}; mend the line")

    return read_lines(path, parse, holds=holds, skip=refuse)


def _labelled(value: Any, number: int, source: str) -> tuple[str, str, str]:
    given = value if isinstance(value, dict) else {}
    return _field(given, "prompt", source, _LABELLED), _field(given, "answer", source, _LABELLED), source


def _text(value: Any, number: int, source: str) -> tuple[str, str]:
    given = value if isinstance(value, dict) else {"text": value}
    return _field(given, "text", source, _TEXTS), source


def _field(row: dict[str, Any], key: str, source: str, expected: str) -> str:
    text = row.get(key)
    if not isinstance(text, str) or not text.strip():
        raise PromptError(f"{source} has no text under {key!r}; {expected}")
    return text
