"""Check the form of classes in a configuration: labels, aliases, words and prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ensembler.errors import ConfigError

_SHOWN = 3  # names in an error's line


def check_labels(labels: Any, source: str) -> list[str]:
    """Return labels as a list; raise ConfigError unless they are texts, one or more."""
    if isinstance(labels, str) or not isinstance(labels, Sequence) or not labels or not all(map(_is_text, labels)):
        raise ConfigError(f"{source} holds no classes; expected a list of labels, each a text")
    return list(labels)


def check_texts(texts: Any, source: str) -> dict[str, str]:
    """Return texts by label or name; raise ConfigError unless `texts` is a mapping of them."""
    if not isinstance(texts, Mapping):
        raise ConfigError(f"{source} is {type(texts).__name__}; expected a mapping from one text to another")
    for key, value in texts.items():
        if not _is_text(key) or not _is_text(value):
            raise ConfigError(f"{source} has {value!r} for {key!r}; expected a text")
    return dict(texts)


def check_templates(templates: Any, source: str) -> list[str]:
    """Return prompts as a list; raise ConfigError unless each has one {} for the class."""
    if isinstance(templates, str) or not isinstance(templates, Sequence) or not templates:
        raise ConfigError(f"{source} is {templates!r}; expected a list of prompts, each with one {{}} for the class")
    for template in templates:
        if not isinstance(template, str) or template.count("{}") != 1:
            raise ConfigError(f"{source} has the template {template!r}; expected one {{}} in it, for the class")
    return list(templates)


def some(names: Sequence[str]) -> str:
    """Return the first names, quoted, and how many more there are."""
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)
