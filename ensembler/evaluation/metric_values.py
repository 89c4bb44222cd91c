"""Values of metrics as JSON: what lm-eval keeps per document may be a pair, an array or an infinity."""

from __future__ import annotations

import math
from typing import Any

from ensembler.errors import RunError

_FLOAT = "float"


def to_json(value: Any, source: str) -> Any:
    """Return `value` for a line of strict JSON; `from_json` undoes it, but that a tuple comes back as a list.

    NumPy numbers and arrays become numbers and lists, an infinity or NaN an object such as {"float": "-inf"}. Raises
    RunError, which names `source`, for a value that JSON cannot hold.
    """
    if hasattr(value, "tolist"):  # NumPy's scalars and arrays
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT: str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [to_json(item, source) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: to_json(item, source) for key, item in value.items()}
    raise RunError(
        f"{source} has the value {str(value)[:60]!r} ({type(value).__name__}), which no row can hold; "
        "expected numbers, texts and lists of them"
    )


def from_json(value: Any) -> Any:
    """Return what `to_json` was given, as read from JSON."""
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if isinstance(value, dict):
        if value.keys() == {_FLOAT}:
            return float(value[_FLOAT])
        return {key: from_json(item) for key, item in value.items()}
    return value
