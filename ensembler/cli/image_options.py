"""Image classifiers on the command line: their options, their notices, and a sweep over images."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ensembler.cli.command_class import Decorated, log, section
from ensembler.cli.ensemble_options import by_role
from ensembler.cli.option_groups import PATH
from ensembler.errors import ConfigError
from ensembler.launch import this_rank

if TYPE_CHECKING:
    from ensembler.cli.evaluation_options import TaskOptions
    from ensembler.config import EnsembleConfig
    from ensembler.evaluation.ensemble_plan import Plan, PlanOptions
    from ensembler.evaluation.methods import Run
    from ensembler.serving.choice import BackendChoice
    from ensembler.vision.image_tasks import ImageTask

_MOST_SHOWN = 5  # images that cannot be read


def say_left_out(task: ImageTask) -> None:
    """Name images that cannot be read, count them, and files that are none; of several processes one says it."""
    if this_rank() != 0:
        return
    reasons = [reason for of_split in task.skipped.values() for reason in of_split]
    for reason in reasons[:_MOST_SHOWN]:
        log.warning("skipped: %s", reason)
    if reasons:
        log.warning("%s images cannot be read and are left out", f"{len(reasons):,}")
    say_others(task.num_others)


def say_others(num: int) -> None:
    """Count the files that do not end as images do, or lie beside the folders of classes."""
    if num:
        log.info("%s files that are no images, or of no class, are left out", f"{num:,}")


_TEXTS, _IMAGES = "text-generation", "image-classification"


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
        from ensembler.vision.heads import as_images

        config = as_images(config, classes=self.classes, templates=self.templates, aliases=self.aliases)
        for role, head in by_role("--head", self.head, tuple(config.members)).items():
            config.members[role] = replace(config.members[role], head=head)
        return config


_FILE: dict[str, Any] = {"type": PATH, "metavar": "FILE"}
_images = section("Image classifiers")
_IMAGE_OPTIONS = (
    _images(
        "--task", type=click.Choice([_TEXTS, _IMAGES]), default=_TEXTS, show_default=True, help="What the members do."
    ),
    _images(
        "--head", multiple=True, metavar="ROLE=FILE", help="Image member: a linear head on its vision tower; repeat it."
    ),
    _images(
        "--classes",
        **_FILE,
        help="Labels, one on each line; or JSON: a list, or an object from label to words for prompts.",
    ),
    _images(
        "--templates",
        **_FILE,
        help='Prompts of zero-shot members, one on each line with {} for the class.  ["a photo of a {}."]',
    ),
    _images("--aliases", **_FILE, help="JSON object: labels by what members call them."),
)


def image_options(function: Decorated) -> Decorated:
    """Add the options that make an ensemble one of image classifiers; the command gets them as `images`."""

    @wraps(function)
    def collected(*args: Any, **kwargs: Any) -> Any:
        images = ImageOptions(**{field.name: kwargs.pop(field.name) for field in fields(ImageOptions)})
        return function(*args, images=images, **kwargs)

    command: Any = collected
    for option in reversed(_IMAGE_OPTIONS):
        command = option(command)
    result: Decorated = command
    return result


def plan_images(
    run: Run,
    images: Path,
    tasks: TaskOptions,
    options: PlanOptions,
    backend: BackendChoice,
    *,
    strict: bool,
) -> Plan:
    """Return the plan of the images below a folder; those that cannot be read are named on standard error."""
    from ensembler.evaluation.ensemble_plan import Plan
    from ensembler.serving.choice import TRANSFORMERS
    from ensembler.vision.answers import ImageAnswerer
    from ensembler.vision.image_preflight import check_images
    from ensembler.vision.image_tasks import load_image_task

    given = [name for name, value in vars(tasks).items() if value != getattr(type(tasks), name)]
    beside = next((name for name in given if name not in ("limit", "metric")), None)
    if beside is not None:
        raise ConfigError(f"--{beside.replace('_', '-')} and --images were both given; give one of them")
    if options.by_perplexity:
        raise ConfigError("images have no prompts whose likelihood could choose alpha; give --validation")
    if backend.name != TRANSFORMERS:
        raise ConfigError(f"images are not run by {backend.name}; leave --backend out")
    if not isinstance(options.batch_size, int):
        raise ConfigError(f"--batch-size {options.batch_size} is for texts; give a number of images")
    checked = check_images(run.config)
    task = load_image_task(
        images,
        checked.classes,
        aliases=run.config.aliases,
        validation=options.validation,
        limit=tasks.limit,
        seed=options.seed,
        strict=strict,
    )
    say_left_out(task)
    return Plan(run, checked, ImageAnswerer(checked), [task], options)
