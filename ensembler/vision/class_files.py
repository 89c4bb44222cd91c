"""Files that say what an ensemble's classes are called: labels, the words for them, prompts, aliases."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ensembler.class_names import check_labels, check_templates, check_texts
from ensembler.config import IMAGES, EnsembleConfig
from ensembler.errors import ConfigError


def as_images(
    config: EnsembleConfig, *, classes: Path | None = None, templates: Path | None = None, aliases: Path | None = None
) -> EnsembleConfig:
    """Return the same members as an ensemble of image classifiers, with what the files say. Raises ConfigError."""
    labels, texts = (None, None) if classes is None else read_classes(classes)
    return config.replaced(
        task=IMAGES,
        classes=labels,
        class_texts=texts,
        templates=None if templates is None else check_templates(_lines(templates), str(templates)),
        aliases=None if aliases is None else check_texts(_read_json(aliases), str(aliases)),
    )


def read_classes(path: Path) -> tuple[list[str], dict[str, str] | None]:
    """Return the labels in a file, and the words for them in prompts where the file has them.

    A text file has a label on each line; a JSON file is a list of labels, or an object from label to words. Raises
    ConfigError.
    """
    if path.suffix != ".json":
        return _lines(path), None
    content = _read_json(path)
    if isinstance(content, Mapping) and content:
        texts = check_texts(content, str(path))
        return list(texts), texts
    return check_labels(content, str(path)), None


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
