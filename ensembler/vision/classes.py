"""The contract of classes: members may be combined only where logit i is of the same class in all of them.

What the vocabulary is to texts: names are compared in their order, and a difference names the classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ensembler.class_names import some
from ensembler.errors import ClassesError


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
