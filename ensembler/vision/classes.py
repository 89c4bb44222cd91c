"""The contract of classes: members may be combined only where logit i is of the same class in all of them.

What the vocabulary is to texts: names are compared in their order, and a difference names the classes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ensembler.errors import ClassesError, ConfigError
from ensembler.vocab import VocabularyContract

_SHOWN = 3  # classes in an error's line


def label_names(model_config: Any) -> tuple[str, ...]:
    """Return the labels of a `transformers` config in the order of its logits."""
    labels = {int(index): str(name) for index, name in (model_config.id2label or {}).items()}
    return tuple(labels[index] for index in sorted(labels))


def known_as(names: Sequence[str], aliases: Mapping[str, str] | None) -> tuple[str, ...]:
    """Return the names with those that have an alias replaced by the label that it stands for."""
    return tuple((aliases or {}).get(name, name) for name in names)


def agree(
    classes: Sequence[str] | None, members: Mapping[str, Sequence[str] | None], aliases: Mapping[str, str] | None
) -> tuple[str, ...]:
    """Return the classes of an ensemble: those given, or those of its first member that names them.

    `members`: by role, the anchor first, the names of each one's logits in their order; None where a member has none of
    its own and takes the ensemble's. Raises ClassesError, which names the classes that differ.
    """
    named = {role: known_as(names, aliases) for role, names in members.items() if names is not None}
    if classes is None and not named:
        raise ClassesError(f"none of {', '.join(members)} names its classes; give them with --classes FILE")
    first, expected = next(iter(named.items())) if classes is None else ("the list of classes", tuple(classes))
    twice = next((name for name in expected if expected.count(name) > 1), None)
    if twice is not None:
        raise ClassesError(f"{first} has the class {twice!r} twice; give each class a name of its own")
    for role, names in named.items():
        if names != expected:
            raise ClassesError(_difference(first, expected, role, names))
    return expected


def make_contract(classes: Sequence[str], roles: Sequence[str]) -> VocabularyContract:
    """Return the contract that the combination and the points of a grid take: all members hold all classes."""
    widths = dict.fromkeys(roles, len(classes))
    return VocabularyContract("identical", len(classes), widths, widths, dict.fromkeys(roles, 0))


def _difference(first: str, expected: Sequence[str], role: str, names: Sequence[str]) -> str:
    remedy = "if they are the same classes, give --aliases FILE; otherwise choose members of the same data set"
    lacking = [name for name in expected if name not in names]
    extra = [name for name in names if name not in expected]
    if not lacking and not extra:
        index = next(i for i, (one, other) in enumerate(zip(expected, names, strict=False)) if one != other)
        return (
            f"{first} and {role} have the same classes in another order: class {index} is {expected[index]!r} and "
            f"{names[index]!r}; save the member with its classes in one order"
        )
    parts = [f"lacks {_shown(lacking)}"] if lacking else []
    parts += [f"has {_shown(extra)} besides"] if extra else []
    return f"{first} has {len(expected):,} classes; {role} {' and '.join(parts)}: {remedy}"


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more


def read_classes(path: Path) -> tuple[list[str], dict[str, str] | None]:
    """Return the labels in a file, and the words for them in prompts where the file has them.

    A text file has a label on each line; a JSON file is a list of labels, or an object from label to words. Raises
    ConfigError.
    """
    if path.suffix != ".json":
        return _lines(path), None
    content = _read_json(path)
    if isinstance(content, Mapping):
        texts = _texts(content, path)
        return list(texts), texts
    if not isinstance(content, list) or not content or not all(isinstance(name, str) for name in content):
        raise ConfigError(f"{path} holds no classes; expected a list of labels, or an object from label to words")
    return content, None


def read_templates(path: Path) -> list[str]:
    """Return the prompts in a file, one on each line, {} standing for the class. Raises ConfigError."""
    return check_templates(_lines(path), str(path))


def check_templates(templates: Sequence[str], source: str) -> list[str]:
    """Return prompts of which each has one {} for the class. Raises ConfigError."""
    for template in templates:
        if not isinstance(template, str) or template.count("{}") != 1:
            raise ConfigError(f"{source} has the template {template!r}; expected one {{}} in it, for the class")
    return list(templates)


def read_aliases(path: Path) -> dict[str, str]:
    """Return labels by what members call them, from a JSON object. Raises ConfigError."""
    content = _read_json(path)
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path} holds no aliases; expected a JSON object from a member's name to a label")
    return _texts(content, path)


def _texts(content: Mapping[Any, Any], path: Path) -> dict[str, str]:
    for key, value in content.items():
        if not isinstance(value, str) or not value:
            raise ConfigError(f"{path} has {value!r} for {key!r}; expected a text")
    return dict(content)


def _lines(path: Path) -> list[str]:
    lines = [line.strip() for line in _read(path).splitlines() if line.strip()]
    if not lines:
        raise ConfigError(f"{path} is empty; expected one name or prompt on each line")
    return lines


def _read_json(path: Path) -> Any:
    try:
        return json.loads(_read(path))
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON file: {error}") from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
