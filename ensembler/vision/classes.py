"""The classes of an ensemble: files that name them, and the contract that logit i is of one class in all members.

What the vocabulary is to texts: names are compared in their order, and a difference names the classes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ensembler.class_names import check_labels, check_templates, check_texts, some
from ensembler.config import IMAGES, EnsembleConfig
from ensembler.errors import ClassesError, ConfigError


def as_images(
    config: EnsembleConfig,
    *,
    classes: str | Path | None = None,
    templates: str | Path | None = None,
    aliases: str | Path | None = None,
) -> EnsembleConfig:
    """Return the same members as an ensemble of image classifiers, with what the files say.

    `classes`: labels as a text file with one on each line, a JSON list, or a JSON object from label to the words for it
    in prompts. `templates`: prompts, one on each line. `aliases`: a JSON object. Raises ConfigError.
    """
    said: dict[str, Any] = {}
    if classes is not None:
        is_json = Path(classes).suffix == ".json"
        labels = _read(classes, json.loads) if is_json else _read_lines(classes)
        if isinstance(labels, Mapping) and labels:
            said["class_texts"] = check_texts(labels, str(classes))
            labels = list(labels)
        said["classes"] = check_labels(labels, str(classes))
    if templates is not None:
        said["templates"] = check_templates(_read_lines(templates), str(templates))
    if aliases is not None:
        said["aliases"] = check_texts(_read(aliases, json.loads), str(aliases))
    return config.replaced(task=IMAGES, **said)


def _read_lines(path: str | Path) -> list[str]:
    lines = [line.strip() for line in _read(path, str.splitlines) if line.strip()]
    if not lines:
        raise ConfigError(f"{path} is empty; expected one name or prompt on each line")
    return lines


def _read(path: str | Path, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is no JSON file: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def agree(
    classes: Sequence[str] | None, members: Mapping[str, Sequence[str] | None], aliases: Mapping[str, str] | None
) -> tuple[str, ...]:
    """Return the classes of an ensemble: those given, or those of its first member that names them.

    `members`: by role, the anchor first, the names of each one's logits in their order; None where a member has none of
    its own and takes the ensemble's. Raises ClassesError, which names the classes that differ.
    """
    named = {} if classes is None else {"the list of classes": tuple(classes)}
    for role, names in members.items():
        if names is not None:
            named[role] = tuple((aliases or {}).get(name, name) for name in names)
    if not named:
        raise ClassesError(f"none of {', '.join(members)} names its classes; give them with --classes FILE")
    first, expected = next(iter(named.items()))
    twice = next((name for name in expected if expected.count(name) > 1), None)
    if twice is not None:
        raise ClassesError(f"{first} has the class {twice!r} twice; give each class a name of its own")
    for role, names in named.items():
        if names != expected:
            raise ClassesError(_difference(first, expected, role, names))
    return expected


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
    parts = [f"lacks {some(lacking)}"] if lacking else []
    parts += [f"has {some(extra)} besides"] if extra else []
    return f"{first} has {len(expected):,} classes; {role} {' and '.join(parts)}: {remedy}"
