"""Values of a recipe, checked one by one: each error says where it is, what was given and what was expected."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ensembler.errors import ConfigError


def check_keys(content: Any, known: Sequence[str], where: str) -> None:
    """Raise ConfigError unless `content` is a mapping with no other keys than the `known`."""
    check_mapping(content, where)
    for key in content:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}{nearest(str(key), known)}")


def check_mapping(content: Any, where: str) -> None:
    """Raise ConfigError unless `content` is a mapping."""
    if not isinstance(content, Mapping):
        raise ConfigError(f"{where} is {content!r}; expected a mapping")


def nearest(name: str, known: Sequence[str]) -> str:
    """Return the end of an error's line: what was meant, or all that is known."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else f"; expected one of {', '.join(known)}"


def read_text(value: Any, where: str) -> str:
    """Return a text that is not empty."""
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{where} is {value!r}; expected a text")
    return value


def read_count(value: Any, where: str, *, least: int = 1) -> int:
    """Return a whole number."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{where} is {value!r}; expected a whole number from {least}")
    return value


def read_number(value: Any, where: str) -> float:
    """Return a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{where} is {value!r}; expected a number")
    return float(value)
