"""The classes of an ensemble, and linear heads over the features of a vision tower that make logits of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from ensembler.config import IMAGES, EnsembleConfig
from ensembler.errors import ClassesError, ConfigError, MemberError
from ensembler.files import one_line, write_whole
from ensembler.safetensors_files import stored_tensors

_NUM_SHOWN = 3  # names in an error's line
_FLAGS = {None: None, "true": True, "false": False}  # normalize in a head's metadata


def as_images(
    config: EnsembleConfig,
    *,
    classes: str | Path | None = None,
    templates: str | Path | None = None,
    aliases: str | Path | None = None,
) -> EnsembleConfig:
    """Return the same members as an ensemble of image classifiers, with the classes and prompts of files.

    `classes`: labels as a text file with one on each line, a JSON list, or a JSON object from label to the words for it
    in prompts. `templates`: prompts, one on each line. `aliases`: a JSON object, see `agree`. Raises ConfigError.
    """
    config = config.replaced(task=IMAGES)
    for key, path in (("classes", classes), ("templates", templates), ("aliases", aliases)):
        if path is None:
            continue
        content = _read(Path(path), is_json=key == "aliases" or (key == "classes" and Path(path).suffix == ".json"))
        has_words = key == "classes" and isinstance(content, Mapping)
        settings = {"classes": list(content), "class_texts": content} if has_words else {key: content}
        try:
            config = config.replaced(**settings)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
    return config


def _read(path: Path, *, is_json: bool) -> Any:
    """Return the JSON of a file, or its lines that are not empty. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text) if is_json else [line.strip() for line in text.split("\n") if line.strip()]
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is no JSON file: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not content:
        raise ConfigError(f"{path} is empty; expected one name or prompt on each line, or in JSON a list or an object")
    return content


def agree(
    classes: Sequence[str] | None,
    members: Mapping[str, Sequence[str] | None],
    aliases: Mapping[str, str | list[str]] | None,
) -> tuple[str, ...]:
    """Return the classes of an ensemble: those given, or those of its first member that names them.

    `members`: by role, the anchor first, the names of each one's logits in their order; None where a member has none of
    its own and takes the ensemble's. `aliases`: labels by what members call them; a name that a member has for several
    classes has a list of labels, in the order of the classes. Raises ClassesError, which names the classes that differ.
    """
    named = {} if classes is None else {"the list of classes": tuple(classes)}
    for role, names in members.items():
        if names is not None:
            named[role] = _renamed(role, names, aliases or {})
    if not named:
        raise ClassesError(f"none of {', '.join(members)} names its classes; give them with --classes FILE")
    for owner, names in named.items():
        _check_unique(owner, names, members.get(owner))
    first, expected = next(iter(named.items()))
    for role, names in named.items():
        if names != expected:
            raise ClassesError(_difference(first, expected, role, names))
    return expected


def _renamed(role: str, names: Sequence[str], aliases: Mapping[str, str | list[str]]) -> tuple[str, ...]:
    """Return a member's labels by its names for them. Raises ClassesError."""
    rest: dict[str, list[str]] = {}
    for name, labels in aliases.items():
        if isinstance(labels, list) and (num := names.count(name)) and not (num == 1 and name in labels):
            if num != len(labels):
                raise ClassesError(
                    f"aliases has {len(labels)} labels for {name!r}, which {role} has {num} classes of; give one label "
                    "for each"
                )
            rest[name] = list(labels)
    own = {name: label for name, label in aliases.items() if isinstance(label, str)}
    return tuple(rest[name].pop(0) if name in rest else own.get(name, name) for name in names)


def _check_unique(owner: str, labels: Sequence[str], own: Sequence[str] | None) -> None:
    """Raise ClassesError where two classes have one label; `own` are the names that a member has for its classes."""
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is None:
        return
    indices = [index for index, label in enumerate(labels) if label == twice]
    remedy = "give each class a label of its own"
    if own is not None and len({own[index] for index in indices}) == 1:
        example = {own[indices[0]]: [f"{own[indices[0]]} ({number + 1})" for number in range(len(indices))]}
        remedy = f"give --aliases FILE with a label for each of them, such as {json.dumps(example)}"
    raise ClassesError(
        f"{owner} has the class {twice!r} {len(indices)} times ({', '.join(map(str, indices))}); {remedy}"
    )


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
    faults = [f"lacks {quoted(lacking)}"] if lacking else []
    faults += [f"has {quoted(extra)} besides"] if extra else []
    return f"{first} has {len(expected):,} classes; {role} {' and '.join(faults)}: {remedy}"


def quoted(names: Sequence[str]) -> str:
    """Return the first names, quoted, and how many more there are."""
    more = f" and {len(names) - _NUM_SHOWN:,} more" if len(names) > _NUM_SHOWN else ""
    return ", ".join(map(repr, names[:_NUM_SHOWN])) + more


@dataclass(frozen=True)
class HeadInfo:
    """The header of a head's file: `classes` and `normalize` are None where they are not in its metadata."""

    num_classes: int
    classes: tuple[str, ...] | None
    normalize: bool | None


class Head(nn.Module):
    """logits = W f + b, with f / ‖f‖ in place of f where `normalize`; features (rows, F), logits (rows, C)."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, normalize: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.normalize = normalize

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (rows, C) in float32, whatever the dtype of the features."""
        features = features.float()
        if self.normalize:
            features = functional.normalize(features, dim=-1)
        return functional.linear(features, self.weight, self.bias)


def read_info(path: Path) -> HeadInfo:
    """Return the header of a head's file; raise MemberError where it is damaged or of another file."""
    if not path.is_file():
        raise MemberError(f"there is no head {path}; give a safetensors file with weight (classes, features)")
    tensors = stored_tensors(path)
    shape = tensors["weight"].shape if "weight" in tensors else ()
    if len(shape) != 2:
        raise MemberError(f"{path} has no matrix 'weight'; expected (classes, features), and perhaps a 'bias'")
    unknown = sorted(set(tensors) - {"weight", "bias"})
    if unknown or ("bias" in tensors and tensors["bias"].shape != shape[:1]):
        fault = f"holds {unknown[0]!r}" if unknown else f"has a bias of shape {tensors['bias'].shape}"
        raise MemberError(f"{path} {fault}; expected weight (classes, features) and bias (classes,) alone")
    with _opened(path) as file:
        metadata = file.metadata() or {}
    flag = metadata.get("normalize")
    if flag not in _FLAGS:
        raise MemberError(f"{path} says normalize {flag!r}; expected 'true' or 'false' in its metadata")
    try:
        classes = tuple(json.loads(metadata["classes"])) if "classes" in metadata else None
    except (ValueError, TypeError):
        classes = ()
    if classes is not None and (len(classes) != shape[0] or not all(isinstance(name, str) for name in classes)):
        raise MemberError(f"{path} says classes that are not {shape[0]} names; expected a JSON list in its metadata")
    return HeadInfo(shape[0], classes, _FLAGS[flag])


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise MemberError(f"the head {path} cannot be read: {one_line(error)}") from error


def load_head(path: Path, *, normalize: bool) -> Head:
    """Return the head in a file, in float32. Raises MemberError."""
    with _opened(path) as file:
        # Copied, since a product with weights that are not aligned in memory, as in a file, rounds otherwise.
        tensors = {name: file.get_tensor(name).to(torch.float32, copy=True) for name in file.keys()}  # noqa: SIM118
    return Head(**tensors, normalize=normalize)


def save_head(head: Head, classes: Sequence[str], path: Path) -> None:
    """Write a head's file in one rename; two processes that make the same may both do so. Raises OutputError."""
    metadata = {"classes": json.dumps(list(classes)), "normalize": str(head.normalize).lower()}
    write_whole(path, save(head.state_dict(), metadata))
