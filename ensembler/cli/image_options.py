"""Options that make an ensemble one of image classifiers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ensembler.cli.options import by_role
from ensembler.errors import ConfigError

if TYPE_CHECKING:
    from ensembler.config import EnsembleConfig

_TEXTS, _IMAGES = "text-generation", "image-classification"
Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True)
class ImageOptions:
    """Settings of an ensemble of image classifiers besides its members, as given on the command line."""

    task: str
    head: tuple[str, ...]
    classes: Path | None
    templates: Path | None
    aliases: Path | None

    @property
    def is_given(self) -> bool:
        """Return whether the ensemble is one of image classifiers."""
        return self.task == _IMAGES

    def apply(self, config: EnsembleConfig) -> EnsembleConfig:
        """Return the configuration with these; raise ConfigError where they are for another task."""
        if not self.is_given:
            beside = next((name for name in ("head", "classes", "templates", "aliases") if getattr(self, name)), None)
            if beside is not None:
                raise ConfigError(f"--{beside} was given without --task {_IMAGES}; add it")
            return config
        from ensembler.vision.classes import as_images

        config = as_images(config, classes=self.classes, templates=self.templates, aliases=self.aliases)
        for role, head in by_role("--head", self.head, tuple(config.members)).items():
            config.members[role] = replace(config.members[role], head=head)
        return config


_FILE: dict[str, Any] = {"type": click.Path(path_type=Path), "metavar": "FILE"}
_IMAGE_OPTIONS = (
    click.option(
        "--task", type=click.Choice([_TEXTS, _IMAGES]), default=_TEXTS, show_default=True, help="What the members do."
    ),
    click.option(
        "--head", multiple=True, metavar="ROLE=FILE", help="Image member: a linear head on its vision tower; repeat it."
    ),
    click.option(
        "--classes",
        **_FILE,
        help="Labels, one on each line; or JSON: a list, or an object from label to words for prompts.",
    ),
    click.option(
        "--templates",
        **_FILE,
        help='Prompts of zero-shot members, one on each line with {} for the class.  ["a photo of a {}."]',
    ),
    click.option("--aliases", **_FILE, help="JSON object: labels by what members call them."),
)


def image_options(function: Command) -> Command:
    """Add the options that make an ensemble one of image classifiers; the command gets them as `images`."""

    @wraps(function)
    def collected(*args: Any, **kwargs: Any) -> Any:
        images = ImageOptions(**{field.name: kwargs.pop(field.name) for field in fields(ImageOptions)})
        return function(*args, images=images, **kwargs)

    command: Any = collected
    for option in reversed(_IMAGE_OPTIONS):
        command = option(command)
    result: Command = command
    return result
