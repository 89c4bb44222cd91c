"""Find the last number of a text, written in one way whatever way the text has it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

NONE = "[invalid]"  # as lm-eval's filters say it

# A minus behind a word or a bracket subtracts. Commas and unbreakable spaces part thousands.
_NUMBER = re.compile(
    r"(?:(?<![\w)\]])(?P<sign>[-−]))?[$€£]?(?:(?P<whole>[0-9]{1,3}(?:[,\u00a0\u202f][0-9]{3})+(?![0-9])|[0-9]+)"
    r"(?:\.(?P<part>[0-9]+))?|\.(?P<only>[0-9]+))"
)


def last_number(text: str) -> str:
    """Return the last number of a text without currency, thousands and zeros that say nothing; `NONE` without one.

    '$70,000.' is '70000', '29.00' is '29', '.50' is '0.5', '−3 degrees' is '-3', and '72 ...' is '72'.
    """
    numbers = list(_NUMBER.finditer(text))
    if not numbers:
        return NONE
    found = numbers[-1]
    whole = re.sub("[^0-9]", "", found["whole"] or "").lstrip("0") or "0"
    part = (found["part"] or found["only"] or "").rstrip("0")
    number = f"{whole}.{part}" if part else whole
    return f"-{number}" if found["sign"] and number != "0" else number


def last_numbers(responses: Iterable[Sequence[str]], documents: object = None) -> list[list[str]]:
    """Return the last number of each response to each document; a `filter_fn` of lm-eval's filter "custom"."""
    return [[last_number(text) for text in texts] for texts in responses]
