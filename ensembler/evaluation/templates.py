"""Texts with fields, such as 'Question: {question}', filled from the rows of a file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ensembler.errors import PromptError

_FIELD = re.compile(r"\{\{([^\W\d][\w-]*)\}\}|\{([^\W\d][\w-]*)\}")


def field_names(template: str) -> list[str]:
    """Return the fields of a template. ``{name}`` is one; other braces, and ``{{name}}``, are text."""
    return [match[2] for match in _FIELD.finditer(template) if match[2]]


def fill(template: str, row: Mapping[str, Any], source: str) -> str:
    """Return `template` with the fields of `row`; ``{{name}}`` becomes ``{name}``.

    A text is taken as it is, anything else as JSON. Raises PromptError, which names `source` and the field, where a
    field is missing or null.
    """
    return _FIELD.sub(
        lambda match: as_text(look_up(match[2], row, source)) if match[2] else f"{{{match[1]}}}", template
    )


def look_up(name: str, row: Mapping[str, Any], source: str) -> Any:
    """Return the field `name` of a row; raise PromptError where it is missing or null."""
    if row.get(name) is None:
        what = f"null under {name!r}" if name in row else f"no field {name!r}"
        known = ", ".join(row) or "none"
        raise PromptError(
            f"{source} has {what}; its fields are {known} (write {{{{{name}}}}} for the braces themselves)"
        )
    return row[name]


def as_text(value: Any) -> str:
    """Return a value of a row as text: one as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
