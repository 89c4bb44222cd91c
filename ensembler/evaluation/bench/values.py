"""Values of a recipe, checked one by one: each error says where it is, what was given and what was expected."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ensembler.errors import ConfigError
from ensembler.rules import parse_alphas


def check_keys(content: Any, known: Sequence[str], where: str, kind: str = "key") -> None:
    """Raise ConfigError unless `content` is a mapping with no other keys, called `kind`, than the `known`."""
    check_mapping(content, where)
    for key in content:
        if key not in known:
            raise ConfigError(f"{where}: unknown {kind} {key!r}{nearest(str(key), known)}")


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


def read_alphas(given: Any, where: str) -> tuple[float, ...]:
    """Return a grid: FIRST:LAST:STEP, numbers with commas, or a list."""
    if isinstance(given, list):
        alphas = tuple(read_number(alpha, f"{where}: one of alphas") for alpha in given)
    else:
        try:
            alphas = parse_alphas(str(given))
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
    twice = next((alpha for alpha in alphas if alphas.count(alpha) > 1), None)
    if twice is not None:
        raise ConfigError(f"{where}: {twice:g} is among the alphas twice; leave one out")
    return alphas


def read_validation(given: Any, where: str) -> str:
    """Return a number of examples, or the name of a split."""
    if isinstance(given, bool) or not isinstance(given, int | str) or not str(given).strip():
        raise ConfigError(f"{where} is {given!r}; expected a number of examples, or the name of a split")
    return str(read_count(given, where)) if isinstance(given, int) else given
